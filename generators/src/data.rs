//! Code shards → sequences in memory, some of them kept apart for validation.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use vqrae::codes::CodeSet;
use vqrae::{Error, Result};

use crate::config::Tokenizer;

/// Sequences of codes, a row a view of an image.
#[derive(Debug, Clone)]
pub struct Sequences {
    /// Whose codes these are.
    pub tokenizer: Tokenizer,
    /// The names of the classes, in the order of their numbers.
    pub classes: Vec<String>,
    codes: Vec<u32>,
    /// A class a row; the number of classes where there is none.
    labels: Vec<u32>,
    paths: Vec<String>,
}

impl Sequences {
    /// Reads a folder of finished shards: those for training and, of every `apart`-th photo of a class, those kept apart. All
    /// views of a photo stay together, and what is kept apart has one view a photo, the first.
    ///
    /// # Errors
    /// If the folder is no whole set of shards, a token has several codes, or images have grids of their own.
    pub fn read(folder: impl AsRef<Path>, apart: usize) -> Result<[Self; 2]> {
        let folder = folder.as_ref();
        let set = CodeSet::open(folder)?;
        set.check_complete()?;
        let wrong = |reason: String| Error::codes(folder, format!("a generator cannot learn these codes: {reason}"));
        let tokenizer = Tokenizer::of(&set.manifest().header).map_err(wrong)?;
        let mut rows = Vec::new();
        for row in set.rows() {
            let row = row?;
            let Some(codes) = row.codes else { continue };
            rows.push((row.path, row.class, row.label, codes));
        }
        let classes = classes(&set.manifest().classes, &rows).map_err(wrong)?;
        let empty = Self { tokenizer, classes, codes: Vec::new(), labels: Vec::new(), paths: Vec::new() };
        let mut parts = [empty.clone(), empty];
        let mut photos: HashMap<u32, usize> = HashMap::new();
        let mut last: Option<(String, bool)> = None;
        for (path, class, label, codes) in rows {
            let number = parts[0].number(class.as_deref(), label);
            let (is_first, is_apart) = match &last {
                Some((before, is_apart)) if *before == path => (false, *is_apart),
                _ => {
                    let count = photos.entry(number).or_default();
                    *count += 1;
                    (true, apart > 0 && (*count).is_multiple_of(apart))
                }
            };
            if !is_apart || is_first {
                parts[usize::from(is_apart)].push(&path, number, &codes);
            }
            last = Some((path, is_apart));
        }
        if parts[0].is_empty() {
            return Err(wrong("no row has codes".to_string()));
        }
        Ok(parts)
    }

    fn push(&mut self, path: &str, label: u32, codes: &[u32]) {
        self.codes.extend(codes);
        self.labels.push(label);
        self.paths.push(path.to_string());
    }

    fn number(&self, class: Option<&str>, label: Option<i64>) -> u32 {
        let by_name = class.and_then(|class| self.classes.iter().position(|name| name == class));
        let by_label =
            || label.and_then(|label| usize::try_from(label).ok()).filter(|&label| label < self.classes.len());
        by_name.or_else(by_label).unwrap_or(self.classes.len()) as u32
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Codes of an image, N.
    pub fn tokens(&self) -> usize {
        self.tokenizer.tokens()
    }

    /// The N codes of a sequence.
    pub fn codes(&self, i: usize) -> &[u32] {
        &self.codes[i * self.tokens()..][..self.tokens()]
    }

    /// The number of its class; the number of classes where it has none.
    pub fn label(&self, i: usize) -> u32 {
        self.labels[i]
    }

    /// Where its image was.
    pub fn path(&self, i: usize) -> &str {
        &self.paths[i]
    }

    /// How often each code occurs, K.
    pub fn counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.tokenizer.codebook_size];
        self.codes.iter().for_each(|&code| counts[code as usize] += 1);
        counts
    }

    /// The sequences of a training step: a function of (seed, step). Every sequence once an epoch, in an order of the epoch's own.
    pub fn batch(&self, seed: u64, step: usize, size: usize) -> Vec<usize> {
        let mut orders: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let place = |at: usize| (at / self.len(), at % self.len());
        (step * size..(step + 1) * size)
            .map(|at| {
                let (epoch, i) = place(at);
                orders.entry(epoch).or_insert_with(|| self.order(seed, epoch))[i]
            })
            .collect()
    }

    fn order(&self, seed: u64, epoch: usize) -> Vec<usize> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(epoch as u64);
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.shuffle(&mut random);
        order
    }
}

/// The classes' names: the manifest's, else those of the rows by name, else numbers.
fn classes<T>(
    named: &[String],
    rows: &[(String, Option<String>, Option<i64>, T)],
) -> std::result::Result<Vec<String>, String> {
    /// More would be no classes but numbers of something else.
    const MOST: i64 = 1 << 20;
    if !named.is_empty() {
        return Ok(named.to_vec());
    }
    let names: std::collections::BTreeSet<&String> = rows.iter().filter_map(|(_, class, ..)| class.as_ref()).collect();
    if !names.is_empty() {
        return Ok(names.into_iter().cloned().collect());
    }
    match rows.iter().filter_map(|(_, _, label, _)| *label).max() {
        Some(most) if most >= MOST => Err(format!("a label is {most}, expected: below {MOST}")),
        Some(most) => Ok((0..=most.max(-1)).map(|label| label.to_string()).collect()),
        None => Ok(Vec::new()),
    }
}
