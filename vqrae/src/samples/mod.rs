//! Images that are kept by many in one file, with their labels and captions: tars of WebDataset and parquet files of the Hugging
//! Face hub.

#[cfg(feature = "parquet")]
mod table;
mod tar;

#[cfg(feature = "parquet")]
pub use table::Table;
pub use tar::Tar;

/// The endings of image files, without the dot.
pub const IMAGE_ENDINGS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"];

/// What members of a tar, or columns of a table, are called: the first that is there is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// Of the image: endings of a tar's members, names of a table's columns.
    pub image: Vec<String>,
    /// Of the caption.
    pub caption: Vec<String>,
    /// Of the label.
    pub label: Vec<String>,
}

impl Keys {
    /// As WebDataset names a sample's members: `jpg` and the like, `txt`, `cls`.
    pub fn webdataset() -> Self {
        Self { image: words(&IMAGE_ENDINGS), caption: words(&["txt"]), label: words(&["cls"]) }
    }

    /// As datasets of the Hugging Face hub name columns.
    pub fn table() -> Self {
        Self {
            image: words(&["image", "img", "jpg", "jpeg", "png", "webp", "bytes"]),
            caption: words(&["caption", "text", "txt", "prompt"]),
            label: words(&["label", "labels", "cls", "class", "fine_label"]),
        }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

/// An image file in memory, and what goes with it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sample {
    /// The image file's bytes.
    pub bytes: Vec<u8>,
    /// The name of its class.
    pub class: Option<String>,
    /// The number of its class.
    pub label: Option<i64>,
    /// Text that goes with it.
    pub caption: Option<String>,
}

impl Sample {
    /// Takes what a label is written as: a number, or the name of a class.
    fn set_label(&mut self, text: &str) {
        match text.trim().parse() {
            Ok(number) => self.label = Some(number),
            Err(_) => self.class = Some(text.trim().to_string()),
        }
    }
}
