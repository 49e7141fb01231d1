//! Photos whose names tell what they show.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vqrae::image::{self, Preprocessor, Resample};
use vqrae::train::data::Photos;

/// Side to which photos are brought once, for crops to be cut from.
const SIDE: usize = 80;

/// The classes of photos.
pub struct Labels {
    /// The number of each photo's class.
    pub numbers: Vec<u32>,
    /// How many classes there are.
    pub classes: usize,
}

impl Labels {
    /// How many of a hundred photos are of the largest class.
    pub fn largest(&self) -> f64 {
        let of_class = |class| self.numbers.iter().filter(|&&number| number == class).count();
        let most = (0..self.classes as u32).map(of_class).max().unwrap_or_default();
        100.0 * most as f64 / self.numbers.len() as f64
    }
}

/// Photos whose classes are known.
pub struct Labelled {
    /// Where they are.
    pub photos: Photos,
    /// What they show.
    pub labels: Labels,
}

/// Writes the photos, brought to [`SIDE`], to `OUTPUT/photos/{train,held-out}/CLASS`, and lists both.
pub fn split(place: &Path, output: &Path) -> anyhow::Result<[Labelled; 2]> {
    let folders = ["train", "held-out"].map(|part| output.join("photos").join(part));
    let small = Preprocessor::siglip(SIDE, Resample::Bicubic);
    let photos = Photos::list(&[place.to_path_buf()])?;
    let mut classes = BTreeMap::<String, usize>::new();
    for i in 0..photos.len() {
        let Some(class) = class(photos.path(i).strip_prefix(place)?) else { continue };
        let count = classes.entry(class.clone()).or_default();
        let folder = folders[usize::from(*count % 4 == 3)].join(class);
        std::fs::create_dir_all(&folder)?;
        image::save_png(&folder.join(format!("{count:05}.png")), &small.prepare(&photos.open(i)?)?)?;
        *count += 1;
    }
    let list = |folder: &PathBuf| {
        let photos = Photos::list(std::slice::from_ref(folder))?;
        let label = |i| class(photos.path(i).strip_prefix(folder).ok()?);
        let number = |class: String| classes.keys().position(|name| *name == class);
        let numbers = (0..photos.len()).filter_map(|i| Some(number(label(i)?)? as u32)).collect();
        Ok::<_, vqrae::Error>(Labelled { photos, labels: Labels { numbers, classes: classes.len() } })
    };
    Ok([list(&folders[0])?, list(&folders[1])?])
}

/// The class of a photo, by its path below the place that was named.
fn class(path: &Path) -> Option<String> {
    match path.parent().and_then(Path::file_name) {
        Some(folder) => Some(folder.to_string_lossy().into_owned()),
        None => Some(path.file_stem()?.to_str()?.split_once('_')?.1.rsplit_once('_')?.0.to_string()),
    }
}
