//! Every recipe is one that the program takes.

use std::path::Path;

use super::{Bench, cli, encoder, fails_with, succeeds};

#[test]
fn every_recipe_is_planned_on_a_tiny_encoder() {
    let bench = Bench::new();
    let siglip = encoder(&bench, "siglip/tiny");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/recipes");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).expect("recipes") {
        let path = entry.expect("a recipe").path();
        if path.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        count += 1;
        let text = std::fs::read_to_string(&path).expect("a recipe");
        let recipe = path.to_str().expect("a path");
        let mut small = Vec::new();
        if text.contains("[model.quantizer]") {
            small.extend(["model.quantizer.codebook_size=24", "model.quantizer.codebook_dim=24"]);
        }
        if text.contains("\nhidden_size = 1152") {
            small.extend(["model.decoder.hidden_size=24", "model.decoder.num_hidden_layers=1"]);
            small.extend(["model.decoder.num_attention_heads=3", "model.decoder.intermediate_size=32"]);
        }
        let mut sets: Vec<&str> = small.iter().flat_map(|wish| ["--set", wish]).collect();
        let model = bench.path("model");
        let model = model.to_str().expect("a path");
        if text.contains("from = \"folder\"") {
            let recipe = if text.contains("[model.quantizer]") {
                recipe
            } else {
                concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/recipes/paper-siglip2-so400m-256.toml")
            };
            let quantizer = ["--set", "model.quantizer.codebook_size=24", "--set", "model.quantizer.codebook_dim=24"];
            let mut init = vec!["init", "--encoder", siglip.to_str().expect("a path"), "--config", recipe, "-o", model];
            init.extend(if sets.is_empty() { &quantizer } else { &sets[..] });
            succeeds(&cli(&init));
            sets.extend(["--from", model]);
        }
        let output = cli(&[&["train", "--config", recipe, "--dry-run"], &sets[..]].concat());
        succeeds(&output);
        let plan = String::from_utf8_lossy(&output.stdout);
        let steps = text.lines().find_map(|line| line.strip_prefix("steps = ")).expect("steps");
        let line =
            |name: &str| plan.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {plan}"));
        assert!(plan.replace(',', "").starts_with(&format!("{steps} steps")), "{recipe}: {plan}");
        let frozen = text.contains("encoder = { peak = 0.0");
        assert_eq!(line("encoder").contains("frozen"), frozen, "{recipe}");
        assert_eq!(plan.contains("teacher"), text.contains("target = \"continuous\" }"), "{recipe}");
        for word in ["decoder", "quantizer", "in all", "rate of the decoder"] {
            assert!(!line(word).is_empty());
        }
        if Path::new(model).exists() {
            std::fs::remove_dir_all(model).expect("a folder");
        }
    }
    assert_eq!(count, 12);
    fails_with(&cli(&["train", "--config", "nowhere.toml", "--dry-run"]), &["nowhere.toml"]);
}
