//! What a generator's folder says of it: `config.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use vqrae::codes::Header;
use vqrae::{Error, Result, vit};

/// The name of the file.
pub const FILE: &str = "config.json";
/// What `model_type` says.
const MODEL_TYPE: &str = "vqrae-generator";

/// Codes that a generator may have; beyond, a table of them would not fit a machine.
const MOST_CODES: usize = 1 << 24;
/// Rows or columns of a grid.
const LONGEST_SIDE: usize = 1 << 10;

/// In which order codes are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Any: some of the codes are known, the rest are masked. Masked diffusion (MDLM, arXiv 2406.07524) and MaskGIT (arXiv
    /// 2202.04200) are two schedules of it.
    Masked,
    /// Row by row, each code by those before it.
    Autoregressive,
}

/// The tokenizer whose codes these are: others mean other patches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokenizer {
    /// [`vqrae::Vqrae::id`].
    pub model_id: String,
    /// How the images of the training codes were prepared.
    pub preprocessing: String,
    /// The number format that the training codes were computed in.
    pub dtype: String,
    /// K.
    pub codebook_size: usize,
    /// Rows and columns of codes of an image.
    pub grid: (usize, usize),
}

impl Tokenizer {
    /// The tokenizer of a set of codes.
    ///
    /// # Errors
    /// If images have grids of their own or tokens several codes: the reason.
    pub fn of(header: &Header) -> std::result::Result<Self, String> {
        if header.codes_per_token != 1 {
            return Err(format!("a token has {} codes, expected: 1", header.codes_per_token));
        }
        let Some(grid) = header.grid else {
            return Err("its images have grids of their own, expected: one grid for all".to_string());
        };
        Ok(Self {
            model_id: header.model_id.clone(),
            preprocessing: header.preprocessing.clone(),
            dtype: header.dtype.clone(),
            codebook_size: header.codebook_size,
            grid,
        })
    }

    /// Codes of an image, N = h · w.
    pub fn tokens(&self) -> usize {
        self.grid.0 * self.grid.1
    }
}

/// The sizes of a generator, and what its codes and classes are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `vqrae-generator`
    pub model_type: String,
    /// The order in which it draws codes.
    pub kind: Kind,
    /// Width D of a token.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
    /// Hidden width of the MLP.
    pub mlp_width: usize,
    /// Learned numbers a code; the tokenizer's own vectors stand beside them.
    pub code_width: usize,
    /// The names of the classes, in the order of their numbers.
    pub classes: Vec<String>,
    /// Whose codes these are.
    pub tokenizer: Tokenizer,
}

impl Config {
    /// A small one: 2 million parameters in blocks.
    pub fn small(kind: Kind, tokenizer: Tokenizer, classes: Vec<String>) -> Self {
        Self {
            model_type: MODEL_TYPE.to_string(),
            kind,
            width: 192,
            depth: 5,
            heads: 6,
            mlp_width: 768,
            code_width: 32,
            classes,
            tokenizer,
        }
    }

    /// The blocks.
    pub fn blocks(&self) -> vit::Config {
        vit::Config {
            width: self.width,
            depth: self.depth,
            heads: self.heads,
            mlp_width: self.mlp_width,
            layer_norm_eps: 1e-6,
            style: vit::Style { causal: self.kind == Kind::Autoregressive, ..vit::Style::default() },
        }
    }

    /// Codes of an image, N.
    pub fn tokens(&self) -> usize {
        self.tokenizer.tokens()
    }

    /// The number of a class by its name or, in decimal, itself.
    ///
    /// # Errors
    /// If there is none: lists those that there are.
    pub fn class(&self, name: &str) -> std::result::Result<usize, String> {
        let by_name = self.classes.iter().position(|class| class == name);
        let by_number = || name.parse().ok().filter(|&number: &usize| number < self.classes.len());
        by_name.or_else(by_number).ok_or_else(|| {
            let names: Vec<String> = self.classes.iter().enumerate().map(|(i, class)| format!("{i} {class}")).collect();
            match names.len() {
                0 => format!("there is no class `{name}`: the generator was trained without classes"),
                _ => format!("there is no class `{name}`; there are: {}", names.join(", ")),
            }
        })
    }

    /// Whether a folder claims to be a generator's.
    pub fn is(folder: &Path) -> bool {
        let json = || serde_json::from_slice::<serde_json::Value>(&std::fs::read(folder.join(FILE)).ok()?).ok();
        json().is_some_and(|json| json["model_type"] == MODEL_TYPE)
    }

    /// Reads `config.json` of a folder.
    ///
    /// # Errors
    /// If it is missing, is not the config of a generator, or makes no sense.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let wrong = |reason: String| Error::config(&path, reason);
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let model_type = json["model_type"].as_str().unwrap_or("(none)");
        if model_type != MODEL_TYPE {
            return Err(wrong(format!(
                "model_type is `{model_type}`, expected: `{MODEL_TYPE}`; is this a generator's folder?"
            )));
        }
        let config: Self = serde_json::from_value(json).map_err(|error| wrong(error.to_string()))?;
        config.check().map_err(wrong)?;
        Ok(config)
    }

    /// As the file has it.
    ///
    /// # Errors
    /// None that a config of strings and numbers could have.
    pub fn to_json(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::config(FILE, error.to_string()))?;
        Ok(text + "\n")
    }

    /// Whether the sizes make sense and stay within what a machine can hold; the error names the field.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> std::result::Result<(), String> {
        self.blocks().check("generator")?;
        let Tokenizer { codebook_size: codes, grid: (h, w), .. } = self.tokenizer;
        let sizes = [
            ("tokenizer.codebook_size", codes, MOST_CODES),
            ("tokenizer.grid", h, LONGEST_SIDE),
            ("tokenizer.grid", w, LONGEST_SIDE),
            ("code_width", self.code_width, 1 << 12),
        ];
        match sizes.into_iter().find(|&(_, size, limit)| size == 0 || size > limit) {
            Some((name, size, limit)) => Err(format!("generator: {name} is {size}, expected: 1 to {limit}")),
            None => Ok(()),
        }
    }
}
