//! The search for the nearest code alone: what is asked for, and what a GPU's answers are told as.

use std::num::NonZeroUsize;

use anyhow::{Result, bail};
use serde::Serialize;

use super::inputs::Inputs;
use super::shape::{CODES, TOKENS, scores};
use super::table::{markdown, three_digits};

/// How large searches are.
#[derive(clap::Args, Debug)]
pub(super) struct SearchArgs {
    /// On a GPU, of the search alone: numbers of tokens; by default 256,1024,8192,65536
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    tokens: Vec<NonZeroUsize>,
    /// On a GPU, of the search alone: widths of codes; by default 8,64,256,1024,1152,1536
    #[arg(long, value_delimiter = ',', value_name = "D,D")]
    widths: Vec<NonZeroUsize>,
    /// On a GPU, of the search alone: number of codes; by default 16384
    #[arg(long, value_name = "K")]
    codes: Option<NonZeroUsize>,
    /// On a GPU, of the search alone: how codes and tokens lie; by default random
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES")]
    inputs: Vec<Inputs>,
}

impl SearchArgs {
    /// Refuses words that nothing would come of.
    pub(super) fn refuse(&self) -> Result<()> {
        if !self.tokens.is_empty() || !self.widths.is_empty() || self.codes.is_some() || !self.inputs.is_empty() {
            bail!(
                "--tokens, --widths, --codes and --inputs are of the search on a GPU; pass --device cuda, or leave them out"
            );
        }
        Ok(())
    }

    /// Every search of the table.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn all(&self) -> Vec<Wanted> {
        let or = |given: &[NonZeroUsize], default: &[usize]| match given {
            [] => default.to_vec(),
            given => given.iter().map(|number| number.get()).collect(),
        };
        let tokens = or(&self.tokens, &[256, 1024, 8192, 65_536]);
        let widths = or(&self.widths, &[8, 64, 256, 1024, 1152, 1536]);
        let inputs = if self.inputs.is_empty() { &[Inputs::Random][..] } else { &self.inputs };
        let wanted = |inputs: &Inputs, d: usize| Wanted { inputs: *inputs, k: self.k(), d, tokens: tokens.clone() };
        let mut all = Vec::new();
        for inputs in inputs {
            // A shipped codebook has one width, its own.
            let widths = if *inputs == Inputs::Shipped { &widths[..1] } else { &widths };
            all.extend(widths.iter().map(|&d| wanted(inputs, d)));
        }
        all
    }

    /// The one search of a process that is measured: the largest of the tokens, the first of the others.
    pub(super) fn one(&self) -> Wanted {
        const MOST_IMAGES: usize = 16;
        Wanted {
            inputs: self.inputs.first().copied().unwrap_or(Inputs::Random),
            k: self.k(),
            d: self.widths.first().map_or(CODES.1, |d| d.get()),
            tokens: vec![self.tokens.iter().max().map_or(MOST_IMAGES * TOKENS, |n| n.get())],
        }
    }

    fn k(&self) -> usize {
        self.codes.map_or(CODES.0, NonZeroUsize::get)
    }
}

/// Searches in one codebook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) inputs: Inputs,
    /// Codes and their width.
    pub(super) k: usize,
    pub(super) d: usize,
    /// Numbers of tokens.
    pub(super) tokens: Vec<usize>,
}

/// Tokens whose codes are compared with those of binary64 on the CPU.
pub(super) const CHECKED: usize = 8192;

/// Which of `n` tokens are compared: all of them, or [`CHECKED`] evenly spread ones.
#[cfg(any(feature = "cuda", test))]
pub(super) fn checked(n: usize) -> Vec<usize> {
    let count = n.min(CHECKED);
    (0..count).map(|i| i * n / count.max(1)).collect()
}

/// One search as it was measured.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) device: String,
    pub(super) inputs: String,
    pub(super) tokens: usize,
    pub(super) width: usize,
    pub(super) codes: usize,
    /// How codes are screened.
    pub(super) method: String,
    /// Seconds: the products alone by cuBLAS in fp16, which are the roof, and ours, the median of the rounds.
    pub(super) gemm: f64,
    pub(super) exact: f64,
    pub(super) fast: f64,
    /// Bytes that a search takes besides its codebook, tokens and codes.
    pub(super) workspace: usize,
    /// Of these tokens, codes other than those of binary64.
    pub(super) checked: usize,
    pub(super) exact_differ: usize,
    pub(super) fast_differ: usize,
    /// Codes that were scored in binary64, a token; and tokens for which all were.
    pub(super) candidates: f64,
    pub(super) fallbacks: usize,
    pub(super) rounds: usize,
}

impl Row {
    /// 10¹² operations a second, of the products of all scores.
    fn teraflops(&self, seconds: f64) -> f64 {
        scores(self.tokens, self.codes, self.width) / seconds / 1e12
    }

    /// The line of JSON: the row, and what follows from it.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn json(&self) -> Result<String> {
        let mut value = serde_json::to_value(self)?;
        let more = serde_json::json!({
            "search": "nearest",
            "gemm_teraflops": self.teraflops(self.gemm),
            "exact_teraflops": self.teraflops(self.exact),
            "fast_teraflops": self.teraflops(self.fast),
            "exact_share": self.gemm / self.exact,
            "fast_share": self.gemm / self.fast,
        });
        if let (Some(row), Some(more)) = (value.as_object_mut(), more.as_object()) {
            row.extend(more.clone());
        }
        Ok(value.to_string())
    }
}

/// The rows in Markdown, with what they mean below.
pub(super) fn table(rows: &[Row]) -> String {
    let heads = [
        "inputs",
        "tokens",
        "width",
        "screened by",
        "cuBLAS fp16, ms (TFLOP/s)",
        "exact, ms (TFLOP/s)",
        "share",
        "fast, ms (TFLOP/s)",
        "share",
        "workspace, MiB",
        "codes that differ from binary64: exact, fast",
        "candidates a token",
    ];
    let cells = |row: &Row| {
        let rate = |seconds: f64| format!("{} ({})", three_digits(seconds * 1e3), three_digits(row.teraflops(seconds)));
        let share = |seconds: f64| format!("{:.0} %", 100.0 * row.gemm / seconds);
        [
            row.inputs.clone(),
            row.tokens.to_string(),
            row.width.to_string(),
            row.method.clone(),
            rate(row.gemm),
            rate(row.exact),
            share(row.exact),
            rate(row.fast),
            share(row.fast),
            three_digits(row.workspace as f64 / f64::from(1 << 20)),
            format!("{}, {} of {}", row.exact_differ, row.fast_differ, row.checked),
            format!("{:.2}", row.candidates),
        ]
    };
    let mut text = markdown(heads, rows.iter().map(cells));
    if rows.iter().any(|row| row.checked < row.tokens) {
        text += &format!("\n\nOf more than {CHECKED} tokens, {CHECKED} evenly spread ones are compared.");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[&str]) -> SearchArgs {
        #[derive(clap::Parser)]
        struct Words {
            #[command(flatten)]
            search: SearchArgs,
        }
        let words = ["bench"].iter().chain(words);
        <Words as clap::Parser>::try_parse_from(words).unwrap().search
    }

    #[test]
    fn the_table_is_the_whole_grid_unless_it_is_narrowed() {
        let all = words(&[]).all();
        assert_eq!(all.iter().map(|wanted| wanted.d).collect::<Vec<_>>(), [8, 64, 256, 1024, 1152, 1536]);
        assert!(all.iter().all(|wanted| wanted.k == 16_384 && wanted.tokens == [256, 1024, 8192, 65_536]));
        let few = words(&["--tokens", "7,3", "--widths", "5", "--codes", "9", "--inputs", "cone,shipped"]);
        let wanted = |inputs| Wanted { inputs, k: 9, d: 5, tokens: vec![7, 3] };
        assert_eq!(few.all(), [wanted(Inputs::Cone), wanted(Inputs::Shipped)]);
        assert_eq!(few.one(), Wanted { tokens: vec![7], ..wanted(Inputs::Cone) });
        assert_eq!(words(&[]).one(), Wanted { inputs: Inputs::Random, k: 16_384, d: 1536, tokens: vec![4096] });
        assert!(words(&[]).refuse().is_ok());
        assert!(few.refuse().unwrap_err().to_string().contains("--device cuda"));
    }

    #[test]
    fn compared_tokens_are_all_or_evenly_spread() {
        assert_eq!(checked(0), Vec::<usize>::new());
        assert_eq!(checked(3), [0, 1, 2]);
        let many = checked(3 * CHECKED);
        assert_eq!((many.len(), many[1], many[CHECKED - 1]), (CHECKED, 3, 3 * (CHECKED - 1)));
    }

    #[test]
    fn rates_and_shares_follow_from_the_seconds() {
        let row = Row {
            device: "a card".to_string(),
            inputs: "random".to_string(),
            tokens: 10_000,
            width: 1000,
            codes: 50_000,
            method: "gemm".to_string(),
            gemm: 0.002,
            exact: 0.0025,
            fast: 0.002,
            workspace: 64 << 20,
            checked: 8192,
            exact_differ: 0,
            fast_differ: 21,
            candidates: 1.25,
            fallbacks: 0,
            rounds: 20,
        };
        let json: serde_json::Value = serde_json::from_str(&row.json().unwrap()).unwrap();
        for (key, value) in
            [("gemm_teraflops", 500.0), ("exact_teraflops", 400.0), ("exact_share", 0.8), ("fast_share", 1.0)]
        {
            assert!((json[key].as_f64().unwrap() - value).abs() < 1e-9, "{key} in {json}");
        }
        assert_eq!((json["tokens"].as_u64(), json["exact_differ"].as_u64()), (Some(10_000), Some(0)));
        let text = table(&[row]);
        for part in ["2.00 (500)", "2.50 (400)", "80 %", "64.0", "0, 21 of 8192", "1.25", "evenly spread"] {
            assert!(text.contains(part), "{part} in: {text}");
        }
    }
}
