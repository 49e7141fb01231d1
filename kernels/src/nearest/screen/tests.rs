use super::*;
use crate::cpu::Bf16;

/// The largest share of its bound that the error of any difference of two scores takes.
fn share_of_bound<T: Screened>(rows: &[f32], bias: &[f64], z: &[f32], isa: Isa) -> f64 {
    let simd = Simd::detect();
    let width = z.len();
    let screen = Screen::<T>::new(rows, bias, &Layout::new(rows, bias, width), isa, simd).unwrap();
    let mut scratch = Scratch::new();
    scratch.reset(1, width);
    screen.begin(0, z, &mut scratch, simd);
    assert!(scratch.rows[0].fate == Fate::Screened);
    let mut scores = vec![0.0; TILE];
    let mut largest = 0f64;
    // The score of the contract less that of the screen is one constant, give or take ε.
    let (mut most, mut least) = (f64::NEG_INFINITY, f64::INFINITY);
    for tile in &screen.tiles {
        let columns = tile.codes.len();
        tile.shadow.multiply(&mut scores, TILE, &scratch.tokens, 0..1, 0, 0..tile.shadow.panels());
        simd.finish(&mut scores[..columns], &tile.slope, &tile.bias, scratch.alpha[0]);
        let epsilon = tile.bound.of(&scratch.reach, 0);
        for (&k, &screened) in tile.codes.iter().zip(&scores) {
            let k = k as usize;
            let off = simd.dot64(z, &rows[k * width..][..width]) + bias[k] - f64::from(screened);
            most = most.max(off - epsilon);
            least = least.min(off + epsilon);
            largest = largest.max(epsilon);
        }
    }
    // off within ± ε of one constant: most <= constant <= least.
    1.0 + (most - least) / (2.0 * largest)
}

fn errors_stay_within_the_bound<T: Screened>() {
    for (seed, width) in [1, 2, 3, 17, 32, 250, 1536].into_iter().enumerate() {
        for scale in [1e-42, 1e-38, 1e-30, 1e-22, 1e-6, 1.0, 1e6, 1e15] {
            let mut state = seed as u32 + 1;
            // Half of the widths draw positive values only, whose errors add up the most.
            let mut value = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let x = (state >> 8) as f32 / (1 << 24) as f32;
                scale * if seed % 2 == 0 { x } else { 2.0 * x - 1.0 }
            };
            let z = (0..width).map(|_| value()).collect::<Vec<_>>();
            let rows = (0..400 * width).map(|_| value()).collect::<Vec<_>>();
            let bias = rows.chunks_exact(width).map(|row| -Simd::detect().dot64(row, row) / 2.0).collect::<Vec<_>>();
            for bias in [&bias, &vec![0.0; 400]] {
                for isa in Isa::tested() {
                    let share = share_of_bound::<T>(&rows, bias, &z, isa);
                    assert!(share <= 1.0, "{}, width {width}, scale {scale:e}: {share} of the bound", isa.name());
                }
            }
        }
    }
}

#[test]
fn errors_of_scores_screened_in_f32_stay_within_the_bound() {
    errors_stay_within_the_bound::<f32>();
}

#[test]
fn errors_of_scores_screened_in_bf16_stay_within_the_bound() {
    errors_stay_within_the_bound::<Bf16>();
}

/// The largest share of its bound that the error of a sum of products takes.
fn share_of_sums<T: Screened>(w: &[f32], c: &[f32], isa: Isa) -> f64 {
    let simd = Simd::detect();
    let (mut row, width) = (Matrix::<T>::new(1, w.len()), w.len());
    row.row_mut(0).iter_mut().zip(w).for_each(|(out, &x)| *out = T::narrow(x));
    let mut sums = [0.0; 16];
    Packed::<T>::new(c, width, isa).multiply(&mut sums, 16, &row, 0..1, 0, 0..1);
    let rounded = |x: &[f32]| x.iter().map(|&x| T::narrow(x).widen()).collect::<Vec<_>>();
    let (w, c) = (rounded(w), rounded(c));
    let norm = |x: &[f32]| simd.dot64(x, x).sqrt();
    let bound = T::sums(width).unwrap().bound(norm(&w), norm(&c), width);
    (f64::from(sums[0]) - simd.dot64(&w, &c)).abs() / bound
}

fn sums_stay_within_their_bound<T: Screened>() {
    let mut state = 1u32;
    let mut value = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    for width in [1, 2, 3, 31, 32, 33, 511, 1536] {
        let mut mixed = || (0..width).map(|_| value() - 0.5).collect::<Vec<_>>();
        let (a, b) = (mixed(), mixed());
        let positive = |x: &[f32]| x.iter().map(|x| x + 0.5).collect::<Vec<_>>();
        let alike = |first: f32, rest: f32| [vec![first], vec![rest; width - 1]].concat();
        let cases = [
            (a.clone(), b.clone()),
            (positive(&a), positive(&b)),
            // Small products that a large sum absorbs, from below and from above half its last place.
            (alike(1.0, 2f32.powi(-12)), alike(1.0, 2f32.powi(-12))),
            (alike(1.0, 2f32.powi(-12)), alike(1.0, 1.5 * 2f32.powi(-13))),
            (alike(1.0, 2f32.powi(-12)), alike(-1.0, 1.5 * 2f32.powi(-12))),
        ];
        for (w, c) in cases {
            for (by_w, by_c) in [(1.0, 1.0), (1e15, 1e15), (1e-19, 1e-19), (1e-38, 1.0), (1.0, 1e-40), (1e-44, 1e3)] {
                let scaled = |x: &[f32], by: f32| x.iter().map(|x| x * by).collect::<Vec<_>>();
                let (w, c) = (scaled(&w, by_w), scaled(&c, by_c));
                for isa in Isa::tested() {
                    let share = share_of_sums::<T>(&w, &c, isa);
                    assert!(share <= 1.0, "{}, width {width}, scales {by_w:e} {by_c:e}: {share}", isa.name());
                }
            }
        }
    }
}

#[test]
fn sums_of_f32_products_stay_within_their_bound() {
    sums_stay_within_their_bound::<f32>();
}

#[test]
fn sums_of_bf16_products_stay_within_their_bound() {
    sums_stay_within_their_bound::<Bf16>();
}
