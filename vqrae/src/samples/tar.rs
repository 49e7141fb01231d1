//! A tar whose members of one stem make a sample, as WebDataset lays them out: `0001.jpg`, `0001.txt`, `0001.cls`.
//!
//! <https://github.com/webdataset/webdataset>: a sample's key is a member's path up to the first dot of its name, and the members of a
//! sample stand side by side.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::{Keys, Sample};

/// Where the samples of a tar are. Of the members only names are held.
#[derive(Debug)]
pub struct Tar {
    file: Mutex<File>,
    samples: Vec<Place>,
    damage: Option<String>,
}

/// A sample's members, and the name of its image.
#[derive(Debug, Default)]
struct Place {
    name: String,
    image: Option<Span>,
    caption: Option<Span>,
    label: Option<Span>,
}

/// First byte and length.
#[derive(Debug, Clone, Copy)]
struct Span {
    at: u64,
    length: u64,
}

/// More than the text of any caption or label.
const MAX_TEXT: u64 = 1 << 20;

impl Tar {
    /// Finds the samples of a tar that have an image, in the order of the file.
    ///
    /// # Errors
    /// If the file cannot be opened. What is damaged in it is no error: see [`Tar::damage`].
    pub fn open(path: &Path, keys: &Keys) -> std::io::Result<Self> {
        Self::of(File::open(path)?, keys)
    }

    /// The same of an open file.
    ///
    /// # Errors
    /// What the system says.
    pub fn of(file: File, keys: &Keys) -> std::io::Result<Self> {
        let length = file.metadata()?.len();
        let (mut samples, mut damage) = (Vec::new(), None);
        let mut archive = tar::Archive::new(file);
        match index(&mut archive, length, keys, &mut samples) {
            Ok(()) => {}
            Err(reason) => damage = Some(reason),
        }
        Ok(Self { file: Mutex::new(archive.into_inner()), samples, damage })
    }

    /// Samples with an image.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Why the tar could not be read to its end; the samples before that place are whole.
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    /// The name of a sample's image, a path in the tar.
    pub fn name(&self, index: usize) -> &str {
        self.samples.get(index).map_or("", |place| &place.name)
    }

    /// Reads a sample.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&self, index: usize) -> Result<Sample, String> {
        let place = self.samples.get(index).ok_or("no such sample")?;
        let mut sample = Sample { bytes: self.bytes(place.image)?, ..Sample::default() };
        let text = |span: Option<Span>| -> Result<Option<String>, String> {
            let Some(span) = span else { return Ok(None) };
            let bytes = self.bytes(Some(Span { length: span.length.min(MAX_TEXT), ..span }))?;
            Ok(Some(String::from_utf8_lossy(&bytes).trim_end().to_string()))
        };
        sample.caption = text(place.caption)?;
        if let Some(label) = text(place.label)? {
            sample.set_label(&label);
        }
        Ok(sample)
    }

    fn bytes(&self, span: Option<Span>) -> Result<Vec<u8>, String> {
        let span = span.ok_or("no such member")?;
        // Its end lies in the file, which the index made sure of: a member's length allocates no more than that.
        let mut bytes = vec![0; span.length as usize];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let read = file.seek(SeekFrom::Start(span.at)).and_then(|_| file.read_exact(&mut bytes));
        read.map(|()| bytes).map_err(|error| error.to_string())
    }
}

/// Adds the samples of an archive of so many bytes, up to where it is damaged.
fn index(archive: &mut tar::Archive<File>, length: u64, keys: &Keys, samples: &mut Vec<Place>) -> Result<(), String> {
    let after = |count: usize, reason: &dyn std::fmt::Display| format!("damaged after {count} members: {reason}");
    let (mut key, mut place, mut count, mut end) = (String::new(), Place::default(), 0, 0);
    let mut settle = |place: Place| samples.extend(Some(place).filter(|place| place.image.is_some()));
    let result = (|| {
        for entry in archive.entries_with_seek().map_err(|error| after(count, &error))? {
            let entry = entry.map_err(|error| after(count, &error))?;
            end = entry
                .raw_file_position()
                .saturating_add(entry.size())
                .checked_next_multiple_of(512)
                .unwrap_or(u64::MAX);
            let kind = entry.header().entry_type();
            if !(kind.is_file() || kind.is_contiguous()) {
                continue;
            }
            let name = entry.path().map_err(|error| after(count, &error))?.to_string_lossy().into_owned();
            let span = Span { at: entry.raw_file_position(), length: entry.size() };
            if span.at.checked_add(span.length).is_none_or(|end| end > length) {
                return Err(after(count, &format!("{name} is cut short")));
            }
            count += 1;
            let Some((stem, ending)) = split(&name) else { continue };
            if stem != key {
                settle(std::mem::take(&mut place));
                key = stem.to_string();
            }
            let is = |wanted: &[String]| wanted.iter().any(|wanted| ending.eq_ignore_ascii_case(wanted));
            if place.image.is_none() && is(&keys.image) {
                (place.image, place.name) = (Some(span), name);
            } else if place.caption.is_none() && is(&keys.caption) {
                place.caption = Some(span);
            } else if place.label.is_none() && is(&keys.label) {
                place.label = Some(span);
            }
        }
        // A block of zeros ends a tar. Without it nothing says that the last member is the last.
        if length > 0 && end.saturating_add(512) > length {
            return Err(after(count, &"it ends without the mark of a tar's end, so it may be cut short"));
        }
        Ok(())
    })();
    settle(place);
    result
}

/// A member's key and its ending: what stands before and after the first dot of its name.
fn split(path: &str) -> Option<(&str, &str)> {
    let start = path.rfind('/').map_or(0, |slash| slash + 1);
    let dot = start + path[start..].find('.').filter(|dot| *dot > 0)?;
    Some((&path[..dot], &path[dot + 1..]))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, bytes) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *bytes).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn open(bytes: &[u8]) -> Tar {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        Tar::of(file, &Keys::webdataset()).unwrap()
    }

    const MEMBERS: &[(&str, &[u8])] = &[
        ("a/01.cls", b"7\n"),
        ("a/01.jpg", b"one"),
        ("a/01.txt", b"a cat\n"),
        ("a/02.json", b"{}"),
        ("a/02.PNG", b"two"),
        ("a/03.txt", b"no image"),
        ("b.d/04.seg.png", b"a mask"),
        ("b.d/04.webp", b"four"),
        ("b.d/04.cls", b"tabby"),
    ];

    #[test]
    fn members_of_one_stem_are_a_sample() {
        let tar = open(&tar(MEMBERS));
        assert_eq!(tar.damage(), None);
        assert_eq!((0..tar.len()).map(|i| tar.name(i)).collect::<Vec<_>>(), ["a/01.jpg", "a/02.PNG", "b.d/04.webp"]);
        let first = tar.read(0).unwrap();
        assert_eq!(
            (first.bytes.as_slice(), first.label, first.caption.as_deref()),
            (&b"one"[..], Some(7), Some("a cat"))
        );
        assert_eq!(tar.read(1).unwrap(), Sample { bytes: b"two".to_vec(), ..Sample::default() });
        assert_eq!(tar.read(2).unwrap().class.as_deref(), Some("tabby"));
        assert!(tar.read(3).is_err());
    }

    #[test]
    fn what_stands_before_the_damage_is_read() {
        let whole = tar(MEMBERS);
        // The header and data of the second sample's image are members 4 and 5: 512 bytes each for header and data.
        let cut = open(&whole[..512 * 8 + 100]);
        assert_eq!(cut.len(), 1);
        assert!(cut.damage().unwrap().contains("damaged after 4 members"), "{:?}", cut.damage());
        // Between two members nothing is broken, but the end is missing.
        let cut = open(&whole[..512 * 8]);
        assert_eq!(cut.len(), 1);
        assert!(cut.damage().unwrap().contains("after 4 members: it ends without"), "{:?}", cut.damage());
        let cut = open(&whole[..512 * 9 + 1]);
        assert_eq!(cut.len(), 1);
        assert!(cut.damage().unwrap().contains("a/02.PNG is cut short"), "{:?}", cut.damage());
        let mut flipped = whole.clone();
        flipped[512 * 8 + 5] ^= 0x55;
        assert!(open(&flipped).damage().is_some());
        assert!(open(b"no tar at all").is_empty());
        assert!(open(b"").damage().is_none());
    }

    #[test]
    fn a_length_beyond_the_file_is_not_believed() {
        let mut header = tar::Header::new_gnu();
        header.set_path("x.jpg").unwrap();
        header.set_size(u64::MAX / 2);
        header.set_cksum();
        let tar = open(header.as_bytes());
        assert!(tar.is_empty() && tar.damage().unwrap().contains("cut short"));
    }
}
