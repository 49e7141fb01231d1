//! Pictures of a codebook: every code's patch on one page, and the most used codes where photos have them.

use vqrae::image::Rgb;

use crate::sheet::paste;

/// The most codes that one page shows.
pub(crate) const MOST: usize = 16_384;

/// White pixels around the page.
pub(crate) const MARGIN: usize = 8;

/// A place on the page that no used code fills.
const DARK: [u8; 3] = [28, 31, 36];

/// A page of patches: rows by brightness, within a row greys, then colours by hue.
pub(crate) struct Atlas {
    /// Side of a patch in pixels.
    pub(crate) patch: usize,
    /// Patches in a row, and rows.
    pub(crate) columns: usize,
    /// The place of each patch given, counted row by row.
    pub(crate) cells: Vec<usize>,
    pub(crate) image: Rgb,
}

impl Atlas {
    /// Lays out square `patches` of one size on a page of `places`; those left over, at the end, are dark.
    pub(crate) fn new(patches: &[Rgb], places: usize) -> Self {
        let patch = patches.first().map_or(1, |patch| patch.width);
        let columns = (places as f64).sqrt().ceil() as usize;
        let cells = arrange(patches, columns);
        let mut image = page(columns * patch + 2 * MARGIN, places.div_ceil(columns) * patch + 2 * MARGIN);
        let dark = Rgb { width: patch, height: patch, data: DARK.repeat(patch * patch) };
        let mut put = |cell: usize, picture: &Rgb| {
            paste(&mut image, picture, MARGIN + cell % columns * patch, MARGIN + cell / columns * patch);
        };
        (patches.len()..places).for_each(|cell| put(cell, &dark));
        patches.iter().zip(&cells).for_each(|(picture, &cell)| put(cell, picture));
        Self { patch, columns, cells, image }
    }
}

/// The place of every patch: the brightest fill the first row, and so on; a row goes as [`across`] says.
fn arrange(patches: &[Rgb], columns: usize) -> Vec<usize> {
    let keys: Vec<(f64, f64)> = patches.iter().map(|patch| (light(mean(patch)), across(patch))).collect();
    let mut order: Vec<usize> = (0..patches.len()).collect();
    order.sort_by(|&a, &b| keys[b].0.total_cmp(&keys[a].0));
    order.chunks_mut(columns).for_each(|row| row.sort_by(|&a, &b| keys[a].1.total_cmp(&keys[b].1)));
    let mut cells = vec![0; patches.len()];
    order.into_iter().enumerate().for_each(|(cell, i)| cells[i] = cell);
    cells
}

/// A mean colour whose channels differ by less is grey.
const GREY: f64 = 28.0;

/// Where a patch stands in its row: greys first, those of strong edges before flat ones; then colours from violet over
/// blue, green, yellow and red to pink.
fn across(patch: &Rgb) -> f64 {
    let [r, g, b] = mean(patch);
    let (high, low) = (r.max(g).max(b), r.min(g).min(b));
    if high - low < GREY {
        return -contrast(patch);
    }
    let sixth = match high {
        _ if high == r => (g - b) / (high - low),
        _ if high == g => 2.0 + (b - r) / (high - low),
        _ => 4.0 + (r - g) / (high - low),
    };
    1.0 + (4.75 - sixth).rem_euclid(6.0)
}

/// The mean distance of a patch's brightness from its own mean.
fn contrast(patch: &Rgb) -> f64 {
    let (pixels, mean) = (patch.data.as_chunks::<3>().0, light(mean(patch)));
    pixels.iter().map(|pixel| (light(pixel.map(f64::from)) - mean).abs()).sum::<f64>() / pixels.len().max(1) as f64
}

fn light([r, g, b]: [f64; 3]) -> f64 {
    0.299 * r + 0.587 * g + 0.114 * b
}

fn mean(patch: &Rgb) -> [f64; 3] {
    let pixels = patch.data.as_chunks::<3>().0;
    let channel = |c: usize| pixels.iter().map(|pixel| f64::from(pixel[c])).sum::<f64>() / pixels.len().max(1) as f64;
    [0, 1, 2].map(channel)
}

/// A code and where it was seen.
pub(crate) struct Seen {
    pub(crate) code: u32,
    /// How often it was chosen.
    pub(crate) count: u64,
    /// Its patch, decoded alone.
    pub(crate) alone: Rgb,
    /// What surrounds it in some reconstructions: see [`surroundings`].
    pub(crate) contexts: Vec<Rgb>,
}

/// Patches across a context.
const AROUND: usize = 5;

/// Pixels between pictures.
const GAP: usize = 4;

/// Columns of codes on the page.
const ACROSS: usize = 2;

/// Side of a pixel of the labels.
const DOT: usize = 2;

/// Room for a label: the longest is `#16777215`.
const LABEL: usize = 9 * 6 * DOT;

/// The surroundings of the patch at `row`, `column` of a reconstruction, its side `patch`: [`AROUND`] patches across where
/// the image is as large, with a frame around the patch.
pub(crate) fn surroundings(image: &Rgb, patch: usize, (row, column): (usize, usize)) -> Rgb {
    let window = |at: usize, length: usize| {
        let size = (AROUND * patch).min(length);
        ((at * patch).saturating_sub(AROUND / 2 * patch).min(length - size), size)
    };
    let ((top, height), (left, width)) = (window(row, image.height), window(column, image.width));
    let mut context = cut(image, (top, left), (height, width));
    let (y, x) = (row * patch - top, column * patch - left);
    frame(&mut context, (x, y), patch, 2, [0; 3]);
    frame(&mut context, (x, y), patch, 1, [255; 3]);
    context
}

/// The part of an image that starts at row and column `(top, left)`.
fn cut(image: &Rgb, (top, left): (usize, usize), (height, width): (usize, usize)) -> Rgb {
    let lines = image.data.chunks_exact(3 * image.width).skip(top).take(height);
    let data = lines.flat_map(|line| &line[3 * left..][..3 * width]).copied().collect();
    Rgb { width, height, data }
}

/// A square line `out` pixels outside the patch at `x`, `y`, as far as the image reaches.
fn frame(image: &mut Rgb, (x, y): (usize, usize), patch: usize, out: usize, colour: [u8; 3]) {
    let (first, last) = (-(out as isize), (patch + out - 1) as isize);
    let sides = (first..=last).flat_map(|i| [(i, first), (i, last), (first, i), (last, i)]);
    for (dx, dy) in sides {
        let at = (x.checked_add_signed(dx), y.checked_add_signed(dy));
        if let (Some(x), Some(y)) = at
            && x < image.width
            && y < image.height
        {
            dot(image, x, y, colour);
        }
    }
}

/// A page with one line a code: its number, how often it was chosen, its patch, and the patch in up to `most` photos.
pub(crate) fn in_context(codes: &[Seen], most: usize) -> Option<Rgb> {
    let patch = codes.first()?.alone.width;
    let side = AROUND * patch;
    let (line, height) = (LABEL + side + 2 * GAP + most * (side + GAP), side + 2 * GAP);
    let rows = codes.len().div_ceil(ACROSS);
    let across = codes.len().min(ACROSS);
    let mut image = page(across * (line + 4 * GAP) + 4 * GAP, rows * height + 6 * GAP);
    for (i, seen) in codes.iter().enumerate() {
        let (mut x, y) = (4 * GAP + i / rows * (line + 4 * GAP), 3 * GAP + i % rows * height + GAP);
        let middle = y + side / 2;
        write(&mut image, (x, middle.saturating_sub(8 * DOT)), &format!("#{}", seen.code), [34, 38, 43]);
        write(&mut image, (x, middle + DOT), &format!("x{}", seen.count), [110, 118, 128]);
        x += LABEL;
        paste(&mut image, &enlarged(&seen.alone, AROUND), x, y);
        x += side + 2 * GAP;
        for context in seen.contexts.iter().take(most) {
            paste(&mut image, context, x, y);
            x += side + GAP;
        }
    }
    Some(image)
}

fn page(width: usize, height: usize) -> Rgb {
    Rgb { width, height, data: vec![255; 3 * width * height] }
}

/// Every pixel `times` × `times`.
fn enlarged(image: &Rgb, times: usize) -> Rgb {
    let line = |line: &[u8]| line.as_chunks::<3>().0.iter().flat_map(|pixel| pixel.repeat(times)).collect::<Vec<_>>();
    let data = image.data.chunks_exact(3 * image.width).flat_map(|pixels| line(pixels).repeat(times)).collect();
    Rgb { width: times * image.width, height: times * image.height, data }
}

/// Seven lines of five dots each, the leftmost dot highest.
const GLYPHS: [(char, [u8; 7]); 12] = [
    ('0', [0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110]),
    ('1', [0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110]),
    ('2', [0b01110, 0b10001, 0b00001, 0b00010, 0b00100, 0b01000, 0b11111]),
    ('3', [0b11111, 0b00010, 0b00100, 0b00010, 0b00001, 0b10001, 0b01110]),
    ('4', [0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010]),
    ('5', [0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110]),
    ('6', [0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110]),
    ('7', [0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000]),
    ('8', [0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110]),
    ('9', [0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100]),
    ('#', [0b01010, 0b01010, 0b11111, 0b01010, 0b11111, 0b01010, 0b01010]),
    ('x', [0b00000, 0b00000, 0b10001, 0b01010, 0b00100, 0b01010, 0b10001]),
];

/// Writes digits, `#` and `x`; what is beyond the edge is left out.
fn write(image: &mut Rgb, (x, y): (usize, usize), text: &str, colour: [u8; 3]) {
    let glyph = |letter: char| GLYPHS.iter().find(|(known, _)| *known == letter).map_or([0; 7], |(_, lines)| *lines);
    for (i, letter) in text.chars().enumerate() {
        for (row, line) in glyph(letter).into_iter().enumerate() {
            for column in (0..5).filter(|column| line >> (4 - column) & 1 == 1) {
                for (dx, dy) in (0..DOT * DOT).map(|k| (k % DOT, k / DOT)) {
                    let (x, y) = (x + (6 * i + column) * DOT + dx, y + row * DOT + dy);
                    if x < image.width && y < image.height {
                        dot(image, x, y, colour);
                    }
                }
            }
        }
    }
}

fn dot(image: &mut Rgb, x: usize, y: usize, colour: [u8; 3]) {
    image.data[3 * (y * image.width + x)..][..3].copy_from_slice(&colour);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(side: usize, colour: [u8; 3]) -> Rgb {
        Rgb { width: side, height: side, data: colour.repeat(side * side) }
    }

    fn pixel(image: &Rgb, x: usize, y: usize) -> [u8; 3] {
        let at = 3 * (y * image.width + x);
        [image.data[at], image.data[at + 1], image.data[at + 2]]
    }

    #[test]
    fn patches_go_from_light_to_dark_and_from_grey_over_blue_to_red() {
        let colours = [[10, 10, 10], [255, 200, 200], [200, 215, 255]];
        let atlas = Atlas::new(&colours.map(|colour| plain(3, colour)), 4);
        assert_eq!((atlas.columns, atlas.patch, atlas.cells), (2, 3, vec![2, 1, 0]));
        assert_eq!((atlas.image.width, atlas.image.height), (2 * 3 + 2 * MARGIN, 2 * 3 + 2 * MARGIN));
        let at = |column: usize, row: usize| pixel(&atlas.image, MARGIN + 3 * column, MARGIN + 3 * row);
        assert_eq!([at(0, 0), at(1, 0), at(0, 1), at(1, 1)], [colours[2], colours[1], colours[0], DARK]);
        assert_eq!(pixel(&atlas.image, 0, 0), [255; 3]);
    }

    #[test]
    fn a_row_goes_from_edges_over_flat_greys_to_hues() {
        let edge = Rgb { width: 2, height: 1, data: vec![0, 0, 0, 255, 255, 255] };
        let colours = [[128; 3], [90, 60, 200], [0, 0, 200], [0, 200, 0], [200, 200, 0], [200, 0, 0], [200, 0, 90]];
        let row: Vec<_> = std::iter::once(edge).chain(colours.map(|colour| plain(2, colour))).collect();
        assert!(row.iter().map(across).is_sorted(), "{:?}", row.iter().map(across).collect::<Vec<_>>());
    }

    #[test]
    fn surroundings_stay_within_the_image_and_frame_the_patch() {
        let image = plain(8 * 4, [100; 3]);
        for (row, column) in [(0, 0), (4, 4), (7, 7), (0, 7)] {
            let context = surroundings(&image, 4, (row, column));
            assert_eq!((context.width, context.height), (20, 20));
            let (x, y) =
                (4 * column - (4 * column).saturating_sub(8).min(12), 4 * row - (4 * row).saturating_sub(8).min(12));
            assert_eq!([pixel(&context, x, y), pixel(&context, x + 3, y + 3)], [[100; 3]; 2]);
            let white = context.data.as_chunks::<3>().0.iter().filter(|&&pixel| pixel == [255; 3]).count();
            assert!(white >= 9, "{white}");
        }
        let small = surroundings(&plain(8, [100; 3]), 4, (1, 1));
        assert_eq!((small.width, small.height), (8, 8));
    }

    #[test]
    fn a_page_holds_a_line_for_every_code() {
        assert!(in_context(&[], 8).is_none());
        for count in [1, 2, 5] {
            let seen =
                |code| Seen { code, count: 7, alone: plain(4, [0, 200, 0]), contexts: vec![plain(20, [0, 0, 200]); 3] };
            let page = in_context(&(0..count).map(seen).collect::<Vec<_>>(), 8).expect("a page");
            let of = |colour| page.data.as_chunks::<3>().0.iter().filter(|&&pixel| pixel == colour).count();
            assert_eq!((of([0, 200, 0]), of([0, 0, 200])), (count as usize * 400, count as usize * 1200));
        }
    }
}
