//! Tokenizers that learn codes, and documents of text and codes in their ids: what is written is read back by rule. What
//! `tokenizers` and `transformers` make of a real one: `readers/readers_lm.py`.

use serde_json::json;
use vqrae::codes::{Header, Row};

use super::export::{
    bench_with, check_row_index, codes, header, json_of, leaves_nothing, megatron, numbers, row, rows, with_codes,
    write_set,
};
use super::*;

/// A tokenizer whose tokens are the letters of ASCII; a letter's id is its place in this text.
const LETTERS: &str =
    "\u{1}\n !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~";

/// Ids of the letters: what the first added token has.
fn count() -> u64 {
    LETTERS.chars().count() as u64
}

/// The letters' tokenizer; `<s>` and `</s>` follow them.
fn tokenizer() -> Value {
    let vocab: BTreeMap<String, usize> = LETTERS.chars().enumerate().map(|(id, letter)| (letter.into(), id)).collect();
    let special = |id: u64, content: &str| json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": [special(count(), "<s>"), special(count() + 1, "</s>")],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": null,
        "model": { "type": "BPE", "dropout": null, "unk_token": "\u{1}", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "vocab": vocab, "merges": [] },
    })
}

fn write_tokenizer(bench: &Bench, name: &str, tokenizer: &Value) {
    bench.write(name, serde_json::to_string_pretty(tokenizer).expect("JSON").as_bytes());
}

/// The ids of a text: a letter each, unknown ones the first.
fn letters(text: &str) -> Vec<u64> {
    text.chars().map(|letter| LETTERS.chars().position(|known| known == letter).unwrap_or_default() as u64).collect()
}

/// A bench with a set of codes and, in `tok`, a tokenizer for them.
fn bench_of(header: &Header, shards: &[Vec<Row>]) -> Bench {
    let bench = bench_with(header, shards);
    write_tokenizer(&bench, "tokenizer.json", &tokenizer());
    bench.run("vocab tokenizer.json -o tok --codes set").exits(0);
    bench
}

/// The ids of an image whose visual tokens begin at `first`, codebooks of K codes one after the other.
fn image(row: &Row, header: &Header, first: u64) -> Vec<u64> {
    let (start, token, end, row_end, first_code) = (first, first + 1, first + 2, first + 3, first + 4);
    let mut ids = vec![start];
    ids.extend(letters(&format!("{}*{}", row.h, row.w)));
    ids.push(token);
    let c = header.codes_per_token;
    for line in codes(row).chunks(row.w as usize * c) {
        let id = |(i, &code): (usize, &u32)| first_code + (i % c * header.codebook_size) as u64 + u64::from(code);
        ids.extend(line.iter().enumerate().map(id));
        ids.push(row_end);
    }
    ids.push(end);
    ids
}

#[test]
fn a_tokenizer_gets_a_token_for_every_code() {
    let bench = Bench::new();
    write_tokenizer(&bench, "some/tokenizer.json", &tokenizer());
    let summary = bench.run("vocab some/tokenizer.json -o out --model model").exits(0).summary();
    let first = count() + 2;
    let expected = json!({ "output": "out", "model_id": bench.id("model"), "first_id": first, "count": 68,
        "first_code_id": first + 4, "vocab_size": first + 68 });
    assert_eq!(summary, expected);
    let (before, mut after) = (tokenizer(), json_of(&bench.bytes("out/tokenizer.json")));
    let added = after["added_tokens"].as_array_mut().expect("a list");
    let new = added.split_off(2);
    assert_eq!(after, before);
    let mut names =
        ["image start", "image token", "image end", "image row end"].map(|name| format!("<|{name}|>")).to_vec();
    names.extend((0..64).map(|code| format!("<|visual token {code:06}|>")));
    for ((i, name), token) in names.iter().enumerate().zip(&new) {
        assert_eq!((&token["content"], &token["id"]), (&json!(name), &json!(first + i as u64)));
        assert_eq!((&token["special"], &token["normalized"]), (&json!(true), &json!(false)));
    }
    assert_eq!(new.len(), names.len());
    // All but the new entries is the file of before, byte for byte.
    let (text, added) = (bench.bytes("some/tokenizer.json"), bench.bytes("out/tokenizer.json"));
    let place = text.iter().zip(&added).take_while(|(a, b)| a == b).count();
    assert!(added.ends_with(&text[place..]), "what follows the new entries differs");
    let record = json_of(&bench.bytes("out/visual_tokens.json"));
    assert_eq!(record["codes"], json!({ "name": "<|visual token {id:06}|>", "first_id": first + 4, "count": 64 }));
    assert_eq!((&record["row_end"]["id"], &record["model_id"]), (&json!(first + 3), &json!(bench.id("model"))));
    assert_eq!(json_of(&bench.bytes("out/tokenizer_config.json"))["tokenizer_class"], "PreTrainedTokenizerFast");

    // The model that ships with the program.
    let summary =
        bench.run("vocab some/tokenizer.json -o shipped --code-name c{id} --row_end <row>").exits(0).summary();
    assert_eq!(summary["count"], 16_388);
    let text = String::from_utf8(bench.bytes("shipped/tokenizer.json")).expect("text");
    assert!(text.contains("\"c16383\"") && text.contains("\"<row>\"") && !text.contains("visual token"));
}

#[test]
fn the_same_command_again_writes_the_same_bytes_and_another_is_refused() {
    let bench = Bench::new();
    bench.make_model("other", 2);
    write_tokenizer(&bench, "tokenizer.json", &tokenizer());
    bench.run("vocab tokenizer.json -o out --model model").exits(0);
    let before = bench.tree("out");
    for (line, output) in [
        ("vocab tokenizer.json -o out", "out"),
        ("vocab out -o out", "out"),
        ("vocab out/tokenizer.json -o twice", "twice"),
    ] {
        bench.run(&format!("{line} --model model")).exits(0);
        assert!(bench.tree(output) == before, "{line}");
    }
    // Without the record, which is then written anew.
    bench.write("bare/tokenizer.json", &bench.bytes("out/tokenizer.json"));
    bench.run("vocab bare -o bare --model model").exits(0);
    assert!(bench.tree("bare") == before);

    for (line, says) in [
        ("vocab out -o new --model other", "but this run is for model"),
        (
            "vocab out -o new --model model --code-name c{id}",
            "but this run has other names; start from the tokenizer without",
        ),
        ("vocab tokenizer.json -o out --model other", "out/visual_tokens.json exists and differs; pass --overwrite"),
        ("vocab tokenizer.json -o out --model model --code-name c{id}", "out/tokenizer.json exists and differs"),
    ] {
        bench.run(line).exits(1).says(&[says]);
        assert!(bench.tree("out") == before && !bench.path("new").exists(), "{line}");
    }
    bench.run("vocab tokenizer.json -o out --model model --code-name c{id} --overwrite").exits(0);
    assert!(bench.tree("out") != before);
    std::fs::remove_file(bench.path("out/visual_tokens.json")).expect("the record");
    bench.run("vocab out -o new --model model").exits(1).says(&["a token `<|image start|>` already", "--image-start"]);
    // The record of another tokenizer says nothing of this one.
    bench.write("out/visual_tokens.json", &bench.bytes("twice/visual_tokens.json"));
    bench.write("out/tokenizer.json", &bench.bytes("tokenizer.json"));
    bench.run("vocab out -o new --model other").exits(0);
}

#[test]
fn names_that_are_taken_or_make_no_sense_are_refused() {
    let bench = Bench::new();
    write_tokenizer(&bench, "tokenizer.json", &tokenizer());
    let line = "vocab tokenizer.json -o out --model model";
    bench
        .run(&format!("{line} --image-end </s>"))
        .exits(1)
        .says(&["tokenizer.json has a token `</s>` already", "another --image-end"]);
    bench.run(&format!("{line} --code-name {{id}}")).exits(1).says(&["a token `0` already", "another --code-name"]);
    bench
        .run(&format!("{line} --image-start <|image|> --image-end <|image|>"))
        .exits(1)
        .says(&["--image-end: two tokens would have"]);
    bench.run(&format!("{line} --code-name code")).exits(2).says(&["{id:06}"]);
    bench.run(&format!("{line} --codes set")).exits(2).says(&["cannot be used with"]);
    leaves(&bench, &["model", "tokenizer.json"]);
}

/// Nothing else is in the folder.
#[track_caller]
fn leaves(bench: &Bench, names: &[&str]) {
    let entries = std::fs::read_dir(bench.path("")).expect("the folder");
    let left: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name())
        .filter(|name| !names.iter().any(|known| name == known))
        .collect();
    assert!(left.is_empty(), "{left:?} is left");
}

#[test]
fn other_files_of_a_folder_come_along() {
    let bench = Bench::new();
    write_tokenizer(&bench, "some/tokenizer.json", &tokenizer());
    let first = count() + 2;
    let bos = json!({ "content": "<s>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true });
    let config =
        json!({ "tokenizer_class": "LlamaTokenizerFast", "added_tokens_decoder": { count().to_string(): bos } });
    bench.write("some/tokenizer_config.json", config.to_string().as_bytes());
    bench.write("some/special_tokens_map.json", br#"{"bos_token": "<s>"}"#);
    bench.write("some/model.safetensors", b"weights of gigabytes");
    bench.run("vocab some -o out --model model").exits(0);
    let names: Vec<_> = bench.tree("out").into_keys().collect();
    let expected = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "visual_tokens.json"];
    assert_eq!(names, expected.map(PathBuf::from));
    let mut config = json_of(&bench.bytes("out/tokenizer_config.json"));
    let decoder = config["added_tokens_decoder"].as_object_mut().expect("an object");
    assert_eq!(decoder.len(), 1 + 68);
    assert_eq!(decoder[&(first + 67).to_string()]["content"], "<|visual token 000063|>");
    assert_eq!(config["tokenizer_class"], "LlamaTokenizerFast");
    bench.run("vocab out -o twice --model model").exits(0);
    assert!(bench.tree("out") == bench.tree("twice"));
    // transformers would give it the first of the new ids.
    bench.write("some/tokenizer_config.json", br#"{"pad_token": "<pad>"}"#);
    let run = bench.run("vocab some -o new --model model").exits(1);
    run.says(&["some/tokenizer_config.json: names the token `<pad>`, but tokenizer.json lacks it", "save_pretrained"]);
    bench.write("some/tokenizer_config.json", b"[");
    bench.run("vocab some -o new --model model").exits(1).says(&["some/tokenizer_config.json: not a configuration"]);
}

#[test]
fn what_is_no_tokenizer_is_refused_by_name() {
    let bench = Bench::new();
    let whole = tokenizer().to_string();
    let merges = json!({ "model": { "type": "BPE", "vocab": { "a": 0, "b": 1 }, "merges": ["a b"] } }).to_string();
    let deep = "[".repeat(100_000);
    for text in [
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        &whole[..whole.len() / 2],
        &whole[..whole.len() - 1],
        &merges,
        &deep,
        "\u{feff}{}",
        &format!("{whole}x"),
    ] {
        bench.write("tokenizer.json", text.as_bytes());
        bench
            .run("vocab tokenizer.json -o out --model model")
            .exits(1)
            .says(&["tokenizer.json: not a tokenizer", "pass the tokenizer.json"]);
    }
    bench.write("tokenizer.json", b"\xff\xfe");
    bench.run("vocab tokenizer.json -o out --model model").exits(1).says(&["tokenizer.json: not a tokenizer"]);
    // A thousand million bytes, none of which are on the disk.
    let file = std::fs::File::create(bench.path("tokenizer.json")).expect("a file");
    file.set_len(1 << 30).expect("a long file");
    bench.run("vocab tokenizer.json -o out --model model").exits(1).says(&["longer than any tokenizer, 256 MiB"]);
    std::fs::remove_file(bench.path("tokenizer.json")).expect("the file");
    bench
        .run("vocab model -o out --model model")
        .exits(1)
        .says(&["model: no tokenizer.json in this folder", "pass the"]);
    bench.run("vocab nowhere -o out --model model").exits(1).says(&["nowhere: no such file or folder", "pass the"]);
    std::fs::create_dir_all(bench.path("tokenizer.json/tokenizer.json")).expect("folders");
    bench.run("vocab tokenizer.json -o out --model model").exits(1).says(&["not a regular file"]);
    std::fs::remove_dir_all(bench.path("tokenizer.json")).expect("the folders");
    write_tokenizer(&bench, "tokenizer.json", &tokenizer());
    bench.run("vocab tokenizer.json -o tokenizer.json --model model").exits(1).says(&["tokenizer.json"]);
    bench.run("vocab tokenizer.json -o out --codes model").exits(1).says(&["no manifest.json"]);
    leaves(&bench, &["model", "tokenizer.json"]);
}

#[test]
fn existing_ids_stay_where_a_file_says_others_or_has_holes() {
    let bench = Bench::new();
    let mut odd = tokenizer();
    odd["model"]["vocab"]["way up"] = json!(5000);
    odd["added_tokens"].as_array_mut().expect("a list").reverse();
    write_tokenizer(&bench, "tokenizer.json", &odd);
    // Readers number added tokens one after the other, from the number of the model's tokens on: `</s>` as the file says.
    let says = format!("has the id {} for `<s>`, but readers give it {}", count(), count() + 2);
    bench.run("vocab tokenizer.json -o out --model model").exits(0).says(&[&says]);
    let vocab = json_of(&bench.bytes("out/tokenizer.json"))["model"]["vocab"].clone();
    assert_eq!(
        (&vocab["way up"], &vocab["</s>"], &vocab["<s>"]),
        (&json!(5000), &json!(count() + 1), &json!(count() + 2))
    );
    assert_eq!((&vocab["<|image start|>"], &vocab["<|visual token 000063|>"]), (&json!(5001), &json!(5068)));
    let before = bench.tree("out");
    bench.run("vocab out -o out --model model").exits(0);
    assert!(bench.tree("out") == before);
}

#[test]
fn documents_are_the_text_and_the_image_in_ids_of_one_tokenizer() {
    for (k, c, grid) in [(64, 1, Some((4, 4))), (64, 3, None), (70_000, 1, None)] {
        let header = header(k, c, grid);
        let shards = rows(&header, 2, 4);
        let bench = bench_of(&header, &shards);
        let (first, images) = (count() + 2, with_codes(&shards));
        let narrow = k * c < 60_000;
        let text = |row: &Row| letters(row.caption.as_ref().expect("a caption"));
        let document = |row: &Row| [text(row), image(row, &header, first)].concat();
        let expected: Vec<_> = images.iter().map(|row| document(row)).collect();

        let summary = bench.run("export set -o mega --format lm --tokenizer tok").exits(0).summary();
        assert_eq!((&summary["layout"], &summary["documents"]), (&json!("lm"), &json!(6)));
        let (dtype, documents) = megatron(&bench.bytes("mega/codes.bin"), &bench.bytes("mega/codes.idx"));
        assert_eq!((dtype, &documents), (if narrow { 8 } else { 4 }, &expected));
        check_row_index(&bench, "mega", &images);

        bench.run("export set -o trove --to lm --as datatrove --tokenizer tok --name photos").exits(0);
        let tokens = bench.bytes("trove/photos.ds");
        let tokens = if narrow { numbers::<2>(&tokens) } else { numbers::<4>(&tokens) };
        assert_eq!(tokens, expected.concat());
        let mut end = 0;
        let ends: Vec<u64> = expected
            .iter()
            .map(|document| {
                end += document.len() as u64;
                end
            })
            .collect();
        assert_eq!(numbers::<8>(&bench.bytes("trove/photos.ds.index")), ends);

        // As export.json says to undo it.
        let record = json_of(&bench.bytes("mega/export.json"));
        let codes_of = &record["language"]["visual_tokens"]["codes"];
        let (offset, size) =
            (codes_of["first_id"].as_u64().expect("an id"), codes_of["count"].as_u64().expect("a number"));
        assert_eq!(record["ids"]["id_offset"], offset);
        assert!(record["undo"].as_str().is_some_and(|text| text.contains("visual_tokens.codes")), "{record}");
        let undone = |document: &Vec<u64>| -> Vec<u32> {
            let ids = document.iter().filter(|&&id| (offset..offset + size).contains(&id)).enumerate();
            ids.map(|(i, id)| (id - offset - (i % c * k) as u64) as u32).collect()
        };
        let undone: Vec<_> = documents.iter().map(undone).collect();
        assert_eq!(undone, images.iter().map(|row| codes(row)).collect::<Vec<_>>());
    }
}

#[test]
fn order_and_text_are_as_wished() {
    let header = header(64, 1, Some((2, 3)));
    let mut shards = rows(&header, 1, 5);
    shards[0][2].caption = None;
    let bench = bench_of(&header, &shards);
    let (first, images) = (count() + 2, with_codes(&shards));
    let of = |words: &str| {
        bench.run(&format!("export set -o out --to lm --tokenizer tok --overwrite {words}")).exits(0);
        megatron(&bench.bytes("out/codes.bin"), &bench.bytes("out/codes.idx")).1
    };
    let expected = |document: &dyn Fn(&Row, Vec<u64>) -> Vec<u64>| -> Vec<Vec<u64>> {
        images.iter().map(|row| document(row, image(row, &header, first))).collect()
    };
    let any = |row: &Row| letters(row.caption.as_ref().or(row.class.as_ref()).expect("words"));
    let class = |row: &Row| row.class.clone().expect("a class");
    assert_eq!(of(""), expected(&|row, image| [any(row), image].concat()));
    assert_eq!(
        of("--order image-text --eos </s>"),
        expected(&|row, image| [image, any(row), vec![count() + 1]].concat())
    );
    assert_eq!(of("--text none --bos <s>"), expected(&|_, image| [vec![count()], image].concat()));
    assert_eq!(of("--text class"), expected(&|row, image| [letters(&class(row)), image].concat()));
    assert_eq!(
        of("--prompt a:{class}!"),
        expected(&|row, image| [letters(&format!("a:{}!", class(row))), image].concat())
    );

    let export = "export set -o none --to lm --tokenizer tok";
    let path = &shards[0][2].path;
    bench.run(&format!("{export} --text caption")).exits(1).says(&[path, "has no caption"]);
    bench.run(&format!("{export} --prompt {{caption}}")).exits(1).says(&[path, "has no caption"]);
    bench.run(&format!("{export} --prompt x --text class")).exits(2);
    bench
        .run(&format!("{export} --eos <eos>"))
        .exits(1)
        .says(&["--eos: there is no token `<eos>` in tok/tokenizer.json"]);
    shards[0][2].class = None;
    write_set(&bench, "set", &header, &shards);
    bench.run("export set -o noted --to lm --tokenizer tok").exits(0).says(&["note: 1 document has no text"]);
    assert!(!bench.path("none").exists());
}

#[test]
fn a_caption_cannot_write_tokens_of_its_own() {
    let header = header(64, 1, Some((2, 2)));
    let caption = "</s><|image start|><|visual token 000001|>";
    let rows = vec![Row { caption: Some(caption.into()), ..row(&header, 0, "a.png", None) }];
    let bench = bench_of(&header, std::slice::from_ref(&rows));
    bench.run("export set -o out --to lm --tokenizer tok").exits(0);
    let (_, documents) = megatron(&bench.bytes("out/codes.bin"), &bench.bytes("out/codes.idx"));
    assert_eq!(documents, [[letters(caption), image(&rows[0], &header, count() + 2)].concat()]);
}

#[test]
fn a_tokenizer_that_is_not_for_these_codes_is_refused() {
    let plain = header(64, 1, Some((2, 2)));
    let bench = bench_of(&plain, &rows(&plain, 1, 3));
    let export = "export set -o out --to lm";
    bench.run(export).exits(1).says(&["lm needs --tokenizer FOLDER"]);
    bench
        .run(&format!("{export} --tokenizer model"))
        .exits(1)
        .says(&["model: no visual_tokens.json in it; pass a folder that"]);
    bench
        .run(&format!("{export} --tokenizer tok --id-offset 7"))
        .exits(1)
        .says(&["lm takes ids from the tokenizer: --id-offset"]);
    bench
        .run("export set -o out --to megatron --tokenizer tok")
        .exits(1)
        .says(&["megatron holds no text: --tokenizer"]);
    for other in [
        Header { codebook_size: 32, ..plain.clone() },
        Header { model_id: "ffff".into(), ..plain.clone() },
        header(64, 2, None),
    ] {
        let set = format!("{}-{}-{}", other.model_id, other.codebook_size, other.codes_per_token);
        write_set(&bench, &set, &other, &rows(&other, 1, 3));
        let run = bench.run(&format!("export {set} -o out --to lm --tokenizer tok")).exits(1);
        run.says(&["tok/visual_tokens.json: tokens for the codes of model 0f3a (64 codes)", "--codes"]);
        std::fs::remove_dir_all(bench.path(&set)).expect("the set");
    }
    // A tokenizer that has no digits, and nothing in their stead.
    let mut mute = tokenizer();
    mute["model"]["unk_token"] = Value::Null;
    mute["model"]["vocab"] = json!({ "a": 0 });
    write_tokenizer(&bench, "mute.json", &mute);
    bench.run("vocab mute.json -o mute --codes set").exits(0);
    bench
        .run(&format!("{export} --tokenizer mute"))
        .exits(1)
        .says(&["mute/tokenizer.json", "the size of an image is lost"]);
    std::fs::remove_dir_all(bench.path("mute")).expect("the folder");
    std::fs::remove_file(bench.path("mute.json")).expect("the tokenizer");
    let record = bench.bytes("tok/visual_tokens.json");
    bench.write("tok/visual_tokens.json", b"{}");
    bench.run(&format!("{export} --tokenizer tok")).exits(1).says(&["visual_tokens.json: not a record"]);
    bench.write("tok/visual_tokens.json", &record);
    let whole = bench.bytes("tok/tokenizer.json");
    for bytes in [&bench.bytes("tokenizer.json"), &whole[..whole.len() / 2], b""] {
        bench.write("tok/tokenizer.json", bytes);
        bench.run(&format!("{export} --tokenizer tok")).exits(1).says(&["tok/tokenizer.json: not "]);
    }
    std::fs::remove_dir_all(bench.path("tok")).expect("the tokenizer");
    std::fs::remove_file(bench.path("tokenizer.json")).expect("the tokenizer");
    leaves_nothing(&bench, bench.run(&format!("{export} --tokenizer tok")).exits(1).says(&["no visual_tokens.json"]));
}

/// A disk that is full, played by a limit on the size of a file.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_no_half_tokenizer() {
    let bench = Bench::new();
    write_tokenizer(&bench, "tokenizer.json", &tokenizer());
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -f 2; exec \"$0\" vocab tokenizer.json -o out --model model", BINARY]);
    command.current_dir(bench.path(""));
    finish(command).exits(1).says(&["out/tokenizer.json", "too large"]);
    assert!(bench.tree("out").is_empty());
}
