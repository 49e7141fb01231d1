//! Tables in Markdown, and the numbers in them.

/// Rows below their heads, in columns.
pub(super) fn markdown<const N: usize>(heads: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut lines = vec![heads.map(str::to_string)];
    lines.extend(rows);
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: &[String; N]| {
        let cells: Vec<_> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("| {} |", cells.join(" | "))
    };
    let mut text: Vec<_> = lines.iter().map(line).collect();
    text.insert(1, line(&widths.map(|width| "-".repeat(width))));
    text.join("\n")
}

/// A number in three digits or a few more.
pub(super) fn three_digits(number: f64) -> String {
    let decimals = if number >= 100.0 { 0 } else { usize::from(number < 10.0) + 1 };
    format!("{number:.decimals$}")
}

/// A value that there may be none of.
pub(super) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "–".to_string(), |value| value.to_string())
}

/// The middle one of some seconds, of which there is one at least; of an even number, the later of the two.
pub(super) fn median(seconds: &mut [f64]) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["1".to_string(), "é".to_string()], ["234".to_string(), "–".to_string()]];
        assert_eq!(markdown(["a", "bc"], rows), "| a   | bc |\n| --- | -- |\n| 1   | é  |\n| 234 | –  |");
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([1234.5, 99.94, 9.876, 0.012].map(three_digits), ["1234", "99.9", "9.88", "0.01"]);
        assert_eq!((or_dash(Some(3)), or_dash(None::<u8>)), ("3".to_string(), "–".to_string()));
    }

    #[test]
    fn a_median_is_not_moved_by_one_slow_round() {
        assert_eq!(median(&mut [3.0, 1.0, 900.0, 2.0, 4.0]), 3.0);
        assert_eq!(median(&mut [2.0, 1.0]), 2.0);
        assert!(median(&mut []).is_nan());
    }
}
