//! The few pairs whose pixels are kept: the worst, and a sample of all.

use std::cmp::Ordering;

use anyhow::Result;
use vqrae::image::{Preprocessor, Resample, ResizeMode, Rgb};

use super::judge::{Metric, Pair, Record};

/// Images of a sample.
pub(crate) const SAMPLE: usize = 12;

/// Larger pictures are made smaller before they are kept.
const LARGEST: usize = 512;

/// A pair and its figures.
pub(crate) struct Shown {
    pub(crate) record: Record,
    pub(crate) original: Rgb,
    pub(crate) image: Rgb,
}

/// The worst pairs so far by one metric, and some of all, evenly spread.
pub(crate) struct Gallery {
    metric: Metric,
    most: usize,
    every: usize,
    seen: usize,
    /// The worst first.
    pub(crate) worst: Vec<Shown>,
    pub(crate) sample: Vec<Shown>,
}

impl Gallery {
    /// For `most` of the worst of `total` pairs.
    pub(crate) fn new(metric: Metric, most: usize, total: usize) -> Self {
        Self { metric, most, every: total.div_ceil(SAMPLE).max(1), seen: 0, worst: Vec::new(), sample: Vec::new() }
    }

    /// Keeps a pair, if it is one of the worst or of the sample.
    pub(crate) fn offer(&mut self, record: &Record, (original, image): &Pair) -> Result<()> {
        let shown = || {
            let (original, image) = (smaller(original)?, smaller(image)?);
            Ok::<_, anyhow::Error>(Shown { record: record.clone(), original, image })
        };
        if self.seen.is_multiple_of(self.every) && self.sample.len() < SAMPLE {
            self.sample.push(shown()?);
        }
        self.seen += 1;
        let place = self.worst.partition_point(|other| worse_first(&other.record, record, self.metric).is_lt());
        if place < self.most {
            self.worst.insert(place, shown()?);
            self.worst.truncate(self.most);
        }
        Ok(())
    }
}

/// The worse of two by a metric comes first; of equally bad ones the first by path.
pub(crate) fn worse_first(a: &Record, b: &Record, metric: Metric) -> Ordering {
    b.badness(metric).total_cmp(&a.badness(metric)).then_with(|| a.path.cmp(&b.path))
}

/// An image that fits into [`LARGEST`] pixels a side.
fn smaller(image: &Rgb) -> Result<Rgb> {
    fit(image, LARGEST)
}

/// An image that fits into a square, of the same aspect ratio; it is not made larger.
pub(crate) fn fit(image: &Rgb, side: usize) -> Result<Rgb> {
    let longer = image.width.max(image.height);
    if longer <= side {
        return Ok(image.clone());
    }
    let scaled = |length: usize| (length * side / longer).max(1);
    let size = (scaled(image.height), scaled(image.width));
    let squash =
        Preprocessor { size, resize_mode: ResizeMode::Squash, ..Preprocessor::siglip(side, Resample::Bicubic) };
    Ok(squash.prepare(image)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(width: usize, height: usize) -> Rgb {
        Rgb { width, height, data: vec![9; 3 * width * height] }
    }

    #[test]
    fn the_worst_and_a_sample_are_kept_of_many() {
        const TOTAL: usize = 1000;
        let mut gallery = Gallery::new(Metric::Psnr, 5, TOTAL);
        let psnr = |i: usize| (i * 389 % TOTAL) as f64;
        for i in 0..TOTAL {
            let record = Record::with_psnr(&format!("{i:04}"), psnr(i));
            gallery.offer(&record, &(plain(2, 2), plain(2, 2))).expect("a pair");
        }
        let of = |shown: &[Shown]| shown.iter().map(|shown| shown.record.clone()).collect::<Vec<_>>();
        let worst: Vec<_> = of(&gallery.worst).iter().map(|record| record.get(Metric::Psnr)).collect();
        assert_eq!(worst, [0.0, 1.0, 2.0, 3.0, 4.0].map(Some));
        let sample = of(&gallery.sample);
        assert_eq!(sample.len(), SAMPLE);
        assert_eq!((sample[0].path.as_str(), sample[1].path.as_str()), ("0000", "0084"));
    }

    #[test]
    fn equally_bad_ones_come_by_path_whatever_their_order() {
        let mut gallery = Gallery::new(Metric::Psnr, 2, 3);
        for path in ["c", "a", "b"] {
            gallery.offer(&Record::with_psnr(path, 7.0), &(plain(1, 1), plain(1, 1))).expect("a pair");
        }
        assert_eq!([0, 1].map(|i| gallery.worst[i].record.path.clone()), ["a", "b"]);
    }

    #[test]
    fn what_is_kept_is_small_and_keeps_its_shape() {
        let small = fit(&plain(1000, 200), 512).expect("an image");
        assert_eq!((small.width, small.height), (512, 102));
        assert_eq!(fit(&plain(30, 40), 512).expect("an image"), plain(30, 40));
        assert_eq!(fit(&plain(2000, 1), 100).expect("an image").height, 1);
    }
}
