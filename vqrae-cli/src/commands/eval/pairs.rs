//! Two folders, paired: which image of one belongs to which of the other.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::inputs::Input;

/// Images with the originals that they are compared with, and those that have no partner.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    /// The images that have one, in their order.
    pub(crate) images: Vec<Input>,
    /// Their originals, by the images' relative paths.
    pub(crate) originals: HashMap<PathBuf, Input>,
    /// Images and originals without a partner, and why.
    pub(crate) alone: Vec<(Input, String)>,
}

impl Pairs {
    /// An image belongs to the original of the same relative path, to the one whose whole name it extends (`a.jpg.png` and
    /// `a.jpg`, as `reconstruct` writes it), or to the only one that is called the same up to the extension. One image and
    /// one original belong together whatever they are called.
    pub(crate) fn of(originals: Vec<Input>, images: Vec<Input>) -> Self {
        let mut pairs = Self::default();
        if let ([original], [image]) = (originals.as_slice(), images.as_slice()) {
            pairs.originals.insert(image.relative.clone(), original.clone());
            pairs.images = images;
            return pairs;
        }
        let names = Names::of(&originals);
        let mut taken: Vec<Option<PathBuf>> = vec![None; originals.len()];
        let mut found: Vec<Option<usize>> = vec![None; images.len()];
        // The surest way first, for all images: an image of the very name is not robbed by one that is called alike.
        for by in [Names::exact, Names::extended, Names::alike] {
            for (image, found) in images.iter().zip(&mut found).filter(|(_, found)| found.is_none()) {
                *found = by(&names, &image.relative).filter(|&original| taken[original].is_none());
                if let Some(original) = *found {
                    taken[original] = Some(image.path.clone());
                }
            }
        }
        for (image, found) in images.into_iter().zip(found) {
            match found {
                Some(original) => {
                    pairs.originals.insert(image.relative.clone(), originals[original].clone());
                    pairs.images.push(image);
                }
                None => {
                    let reason = names.why_none(&image.relative, &taken);
                    pairs.alone.push((image, reason));
                }
            }
        }
        let left = originals.into_iter().zip(taken).filter(|(_, taken)| taken.is_none());
        pairs.alone.extend(left.map(|(original, _)| (original, "has no image to compare with it".to_string())));
        pairs
    }
}

/// The originals by their names.
struct Names {
    by_path: HashMap<PathBuf, usize>,
    /// Up to the extension.
    by_stem: HashMap<PathBuf, Vec<usize>>,
}

impl Names {
    fn of(originals: &[Input]) -> Self {
        let by_path = originals.iter().enumerate().map(|(i, original)| (original.relative.clone(), i)).collect();
        let mut by_stem: HashMap<PathBuf, Vec<usize>> = HashMap::new();
        for (i, original) in originals.iter().enumerate() {
            by_stem.entry(original.relative.with_extension("")).or_default().push(i);
        }
        Self { by_path, by_stem }
    }

    fn exact(&self, image: &Path) -> Option<usize> {
        self.by_path.get(image).copied()
    }

    fn extended(&self, image: &Path) -> Option<usize> {
        self.exact(&image.with_extension(""))
    }

    fn alike(&self, image: &Path) -> Option<usize> {
        match self.by_stem.get(&image.with_extension(""))?.as_slice() {
            &[original] => Some(original),
            _ => None,
        }
    }

    fn why_none(&self, image: &Path, taken: &[Option<PathBuf>]) -> String {
        let several = self.by_stem.get(&image.with_extension("")).map_or(0, Vec::len);
        let rivals = [Self::exact, Self::extended, Self::alike].into_iter().filter_map(|by| by(self, image));
        match rivals.filter_map(|original| taken[original].as_ref()).next() {
            Some(other) => format!("its original belongs to {} already", other.display()),
            None if several > 1 => format!("{several} originals are called like it but for their extensions"),
            None => "has no original of this name".to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(folder: &str, names: &[&str]) -> Vec<Input> {
        names.iter().map(|name| Input::file(Path::new(folder).join(name), name.into())).collect()
    }

    fn paired(originals: &[&str], images: &[&str]) -> (Vec<(String, String)>, Vec<String>) {
        let pairs = Pairs::of(inputs("a", originals), inputs("b", images));
        let of = |image: &Input| (image.source(), pairs.originals[&image.relative].source());
        let alone = pairs.alone.iter().map(|(input, reason)| format!("{}: {reason}", input.path.display()));
        (pairs.images.iter().map(of).collect(), alone.collect())
    }

    #[test]
    fn names_are_paired_exactly_or_but_for_an_extension() {
        let (pairs, alone) =
            paired(&["c/x.png", "t.jpg", "t.png", "u.jpg", "v.jpg"], &["c/x.png", "t.png", "u.png", "v.jpg.png"]);
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(
            pairs,
            [pair("c/x.png", "c/x.png"), pair("t.png", "t.png"), pair("u.png", "u.jpg"), pair("v.jpg.png", "v.jpg")]
        );
        assert_eq!(alone, ["a/t.jpg: has no image to compare with it"]);
    }

    #[test]
    fn what_has_no_partner_or_several_is_named() {
        let (pairs, alone) = paired(&["t.jpg", "t.png", "u.png"], &["t.webp", "u.jpg", "u.png", "w.png"]);
        assert_eq!(pairs, [("u.png".to_string(), "u.png".to_string())]);
        let expected = [
            "b/t.webp: 2 originals are called like it but for their extensions",
            "b/u.jpg: its original belongs to b/u.png already",
            "b/w.png: has no original of this name",
            "a/t.jpg: has no image to compare with it",
            "a/t.png: has no image to compare with it",
        ];
        assert_eq!(alone, expected);
    }

    #[test]
    fn one_image_and_one_original_belong_together() {
        let (pairs, alone) = paired(&["before.png"], &["after.jpg"]);
        assert_eq!(pairs, [("after.jpg".to_string(), "before.png".to_string())]);
        assert!(alone.is_empty());
    }
}
