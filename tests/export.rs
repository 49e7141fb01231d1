//! Code shards in other projects' layouts: every file is parsed by the rule of its reader and must say what the rows say. What real
//! readers make of them: `readers/readers.py`.

use std::fs::File;

use serde_json::json;
use vqrae::codes::shard::{self, Layout, Reader, Stats, Tally, Writer};
use vqrae::codes::{CodeSet, Header, Manifest, Row};

use super::*;

/// What the library of this build writes.
const LAYOUT: Layout = if cfg!(feature = "parquet") { Layout::Parquet } else { Layout::Jsonl };

pub(super) fn header(codebook_size: usize, codes_per_token: usize, grid: Option<(usize, usize)>) -> Header {
    Header {
        model_id: "0f3a".into(),
        preprocessing: "32x32-squash-bicubic".into(),
        dtype: "f32".into(),
        codebook_size,
        codes_per_token,
        grid,
    }
}

/// An image with codes that no other has; every one has a label and a caption.
pub(super) fn row(header: &Header, number: usize, path: &str, view: Option<&str>) -> Row {
    let (h, w) = header.grid.unwrap_or((1 + number % 3, 2 + number % 2));
    let code = |i: usize| ((number * 7919 + i * 104_729) % header.codebook_size) as u32;
    Row {
        key: format!("{:05}{:04}", number / 100, number % 100),
        path: path.into(),
        view: view.map(Into::into),
        codes: Some((0..h * w * header.codes_per_token).map(code).collect()),
        h: h as u32,
        w: w as u32,
        width: Some(60),
        height: Some(45),
        class: Some(format!("class {}", number % 3)),
        label: Some(number as i64 % 3),
        caption: Some(format!("photo «{number}»\nof waves")),
        ..Row::default()
    }
}

/// `shards` shards of as many rows: photos of a folder each, the second of which is broken.
pub(super) fn rows(header: &Header, shards: usize, of: usize) -> Vec<Vec<Row>> {
    let one = |shard: usize, i: usize| {
        let (key, path) = (format!("{shard:05}{i:04}"), format!("{shard}/{i:04}.png"));
        match i {
            1 => Row { key, path, error: Some("is no image".into()), ..Row::default() },
            _ => Row { key, ..row(header, shard * of + i, &path, None) },
        }
    };
    (0..shards).map(|shard| (0..of).map(|i| one(shard, i)).collect()).collect()
}

/// The rows that have codes.
pub(super) fn with_codes(shards: &[Vec<Row>]) -> Vec<&Row> {
    shards.iter().flatten().filter(|row| row.codes.is_some()).collect()
}

pub(super) fn codes(row: &Row) -> Vec<u32> {
    row.codes.clone().expect("codes")
}

fn write_shard(bench: &Bench, set: &str, header: &Header, name: &str, count: usize, rows: &[Row]) {
    let folder = bench.path(set);
    let path = shard::file(&folder, name, LAYOUT);
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut writer = Writer::new(File::create(&path).expect("a file"), header, LAYOUT).expect("a writer");
    let mut tally = Tally::new(header);
    for row in rows {
        tally.add(row);
        writer.write(row).expect("a row");
    }
    drop(writer.finish().expect("a shard"));
    let bytes = std::fs::read(&path).expect("the shard");
    let file = (bytes.len() as u64, blake3::hash(&bytes).to_hex().to_string());
    tally.stats(name, LAYOUT, "inputs", Some(count), file).write(&folder).expect("statistics");
}

pub(super) fn write_set(bench: &Bench, set: &str, header: &Header, shards: &[Vec<Row>]) {
    for (i, rows) in shards.iter().enumerate() {
        write_shard(bench, set, header, &format!("{i:05}"), shards.len(), rows);
    }
    let manifest =
        Manifest { image_size: Some(json!([32, 32])), ..Manifest::new("vqrae-cli", "0.1.0", header.clone(), LAYOUT) };
    manifest.write(&bench.path(set)).expect("a manifest");
}

pub(super) fn bench_with(header: &Header, shards: &[Vec<Row>]) -> Bench {
    let bench = Bench::empty();
    write_set(&bench, "set", header, shards);
    bench
}

/// Numbers of a little-endian file.
pub(super) fn numbers<const N: usize>(bytes: &[u8]) -> Vec<u64> {
    let (chunks, rest) = bytes.as_chunks::<N>();
    assert!(rest.is_empty(), "{} bytes left over", rest.len());
    let number = |chunk: &[u8; N]| chunk.iter().rev().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
    chunks.iter().map(number).collect()
}

/// An .npy of int64: its shape and its values.
fn int64s(bytes: &[u8]) -> (Vec<usize>, Vec<u64>) {
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let text = std::str::from_utf8(&bytes[10..10 + length]).expect("a header");
    assert!(
        bytes.starts_with(b"\x93NUMPY\x01\0") && text.starts_with("{'descr': '<i8', 'fortran_order': False,"),
        "{text}"
    );
    let shape = text.split(['(', ')']).nth(1).expect("a shape");
    let shape = shape.split(',').filter_map(|size| size.trim().parse().ok()).collect();
    (shape, numbers::<8>(&bytes[10 + length..]))
}

pub(super) fn json_of(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).expect("JSON")
}

fn lines(bytes: &[u8]) -> Vec<Value> {
    bytes.split_inclusive(|&byte| byte == b'\n').map(json_of).collect()
}

/// `rows.jsonl` tells the row of every document.
pub(super) fn check_row_index(bench: &Bench, out: &str, expected: &[&Row]) {
    let told: Vec<Row> = lines(&bench.bytes(&format!("{out}/rows.jsonl")))
        .into_iter()
        .map(|line| serde_json::from_value(line).expect("a row"))
        .collect();
    let expected: Vec<Row> = expected.iter().map(|&row| Row { codes: None, ..row.clone() }).collect();
    assert_eq!(told, expected);
}

/// The documents of a Megatron data set, and the type of its tokens.
pub(super) fn megatron(bin: &[u8], idx: &[u8]) -> (u8, Vec<Vec<u64>>) {
    assert_eq!(&idx[..9], b"MMIDIDX\0\0");
    assert_eq!(numbers::<8>(&idx[9..17]), [1]);
    let dtype = idx[17];
    let [sequences, documents] = numbers::<8>(&idx[18..34])[..] else { panic!("two counts") };
    let n = sequences as usize;
    assert_eq!(documents, sequences + 1);
    assert_eq!(idx.len(), 34 + 4 * n + 8 * n + 8 * (n + 1));
    let lengths = numbers::<4>(&idx[34..34 + 4 * n]);
    let pointers = numbers::<8>(&idx[34 + 4 * n..34 + 12 * n]);
    assert_eq!(numbers::<8>(&idx[34 + 12 * n..]), (0..=sequences).collect::<Vec<_>>());
    let width = match dtype {
        8 => 2,
        4 => 4,
        other => panic!("a token of type {other}"),
    };
    let tokens = if width == 2 { numbers::<2>(bin) } else { numbers::<4>(bin) };
    assert_eq!(lengths.iter().sum::<u64>(), tokens.len() as u64);
    let document = |(&length, &begin): (&u64, &u64)| {
        let begin = begin as usize / width;
        tokens[begin..begin + length as usize].to_vec()
    };
    (dtype, lengths.iter().zip(&pointers).map(document).collect())
}

/// What a row becomes: an offset, a token after each row of the grid and tokens around the image.
fn expected_tokens(row: &Row, c: usize, offset: u64, [begin, row_end, end]: [Option<u64>; 3]) -> Vec<u64> {
    let mut tokens: Vec<u64> = begin.into_iter().collect();
    for line in codes(row).chunks(row.w as usize * c) {
        tokens.extend(line.iter().map(|&code| offset + u64::from(code)));
        tokens.extend(row_end);
    }
    tokens.extend(end);
    tokens
}

#[test]
fn megatron_finds_every_image_as_a_document() {
    let header = header(64, 1, Some((4, 4)));
    let shards = rows(&header, 3, 5);
    let bench = bench_with(&header, &shards);
    let summary = bench.run("export set -o out --to megatron").exits(0).says(&["3 rows without codes"]).summary();
    assert_eq!((&summary["documents"], &summary["tokens"], &summary["left_out"]), (&12.into(), &192.into(), &3.into()));
    let (dtype, documents) = megatron(&bench.bytes("out/codes.bin"), &bench.bytes("out/codes.idx"));
    let expected: Vec<_> = with_codes(&shards).iter().map(|row| expected_tokens(row, 1, 0, [None; 3])).collect();
    assert_eq!((dtype, documents), (8, expected));
    check_row_index(&bench, "out", &with_codes(&shards));
    let record = json_of(&bench.bytes("out/export.json"));
    assert_eq!((&record["layout"], &record["dtype"]), (&"megatron".into(), &"uint16".into()));
    assert_eq!((&record["manifest"]["model_id"], &record["ids"]["vocab_size"]), (&"0f3a".into(), &64.into()));
    let hashes: Vec<_> =
        CodeSet::open(bench.path("set")).expect("a set").shards().iter().map(|s| s.blake3.clone()).collect();
    let told: Vec<_> = record["shards"].as_array().expect("a list").iter().map(|s| s["blake3"].clone()).collect();
    assert_eq!(told, hashes);
}

#[test]
fn ids_are_moved_into_a_vocabulary_and_found_again() {
    // Grids of their own, so rows end at different places.
    for (c, grid, k) in [(1, None, 64), (2, Some((3, 2)), 64), (3, None, 70_000)] {
        let header = header(k, c, grid);
        let shards = rows(&header, 2, 4);
        let bench = bench_with(&header, &shards);
        let offset = 32_000;
        let row_end = offset + k as u64;
        let line = format!("--id-offset {offset} --begin 1 --end 2 --row-end {row_end}");
        bench.run(&format!("export set -o mega --to megatron --name photos {line}")).exits(0);
        bench.run(&format!("export set -o trove --to datatrove --name photos {line}")).exits(0);
        let around = [Some(1), Some(row_end), Some(2)];
        let expected: Vec<_> = with_codes(&shards).iter().map(|row| expected_tokens(row, c, offset, around)).collect();
        let (dtype, documents) = megatron(&bench.bytes("mega/photos.bin"), &bench.bytes("mega/photos.idx"));
        assert_eq!((dtype, &documents), (if row_end < 65_499 { 8 } else { 4 }, &expected));
        let tokens = bench.bytes("trove/photos.ds");
        let tokens = if row_end < 65_536 { numbers::<2>(&tokens) } else { numbers::<4>(&tokens) };
        assert_eq!(tokens, expected.concat());

        // As export.json says to undo it.
        let record = json_of(&bench.bytes("mega/export.json"));
        let ids = &record["ids"];
        let special: Vec<_> = ["begin", "row_end", "end"].iter().filter_map(|name| ids[name].as_u64()).collect();
        let id_offset = ids["id_offset"].as_u64().expect("a number");
        let undone = |document: &Vec<u64>| -> Vec<u32> {
            document.iter().filter(|id| !special.contains(id)).map(|id| (id - id_offset) as u32).collect()
        };
        let undone: Vec<_> = documents.iter().map(undone).collect();
        assert_eq!(undone, with_codes(&shards).into_iter().map(codes).collect::<Vec<_>>());
    }
}

#[test]
fn the_width_of_a_token_follows_from_the_vocabulary() {
    for (k, rest, dtype, width) in [
        (65_499, "", 8, 2),
        (65_500, "", 4, 2),
        (65_536, "", 4, 2),
        (65_537, "", 4, 4),
        (64, "--vocab-size 49152", 8, 2),
        (64, "--vocab-size 151936", 4, 4),
        (64, "--id-offset 65472", 4, 2),
        (64, "--id-offset 65473", 4, 4),
        (64, "--end 65498", 8, 2),
        (64, "--end 65499", 4, 2),
        (64, "--end 2147483647", 4, 4),
    ] {
        let header = header(k, 1, Some((2, 2)));
        let shards = rows(&header, 1, 3);
        let bench = bench_with(&header, &shards);
        bench.run(&format!("export set -o mega --to megatron {rest}")).exits(0);
        bench.run(&format!("export set -o trove --to nanotron {rest}")).exits(0);
        let (told, documents) = megatron(&bench.bytes("mega/codes.bin"), &bench.bytes("mega/codes.idx"));
        assert_eq!(told, dtype, "{k} {rest}");
        let tokens: usize = documents.iter().map(Vec::len).sum();
        assert_eq!(bench.bytes("trove/codes.ds").len(), tokens * width, "{k} {rest}");
        let metadata = String::from_utf8(bench.bytes("trove/codes.ds.metadata")).expect("text");
        assert_eq!(
            metadata,
            format!("vqrae-0f3a|{width}\n{tokens}\n{tokens}.{} T", if tokens < 10 { "00" } else { "0" })
        );
    }
}

#[test]
fn datatrove_knows_where_every_image_ends() {
    let header = header(64, 1, None);
    let shards = rows(&header, 2, 5);
    let bench = bench_with(&header, &shards);
    bench.run("export set -o out --to datatrove").exits(0);
    let tokens = numbers::<2>(&bench.bytes("out/codes.ds"));
    let ends = numbers::<8>(&bench.bytes("out/codes.ds.index"));
    let mut begin = 0;
    let images = with_codes(&shards);
    assert_eq!(ends.len(), images.len());
    for (row, &end) in images.iter().zip(&ends) {
        let document: Vec<u32> = tokens[begin..end as usize].iter().map(|&token| token as u32).collect();
        assert_eq!(document, codes(row));
        begin = end as usize;
    }
    assert_eq!(begin, tokens.len());
    check_row_index(&bench, "out", &images);
}

#[test]
fn lines_of_titok_hold_a_class_and_tokens() {
    let header = header(64, 2, Some((2, 3)));
    let shards = rows(&header, 2, 4);
    let bench = bench_with(&header, &shards);
    for name in ["titok-jsonl", "rar", "maskgit"] {
        bench.run(&format!("export set -o {name} --to {name} --name train")).exits(0);
        let expected: Vec<_> =
            with_codes(&shards).iter().map(|row| json!({ "class_id": row.label, "tokens": row.codes })).collect();
        assert_eq!(lines(&bench.bytes(&format!("{name}/train.jsonl"))), expected);
        check_row_index(&bench, name, &with_codes(&shards));
    }
    let separate = "export set -o apart --to rar --id-offset 10 --separate-codebooks";
    bench.run(separate).exits(0);
    let apart = lines(&bench.bytes("apart/codes.jsonl"));
    for (line, row) in apart.iter().zip(with_codes(&shards)) {
        let tokens: Vec<u32> = serde_json::from_value(line["tokens"].clone()).expect("numbers");
        let undone: Vec<u32> = tokens.iter().enumerate().map(|(i, id)| id - 10 - 64 * (i as u32 % 2)).collect();
        assert_eq!(undone, codes(row));
    }
    let record = json_of(&bench.bytes("apart/export.json"));
    assert!(record["undo"].as_str().is_some_and(|text| text.contains("j * codebook_size")), "{record}");
}

#[test]
fn llamagen_finds_views_and_label_of_every_image() {
    let header = header(16_384, 1, Some((4, 4)));
    let views = ["32x32", "32x32/flip"];
    // An image may be spread over two shards.
    let mut all: Vec<Row> = (0..7)
        .flat_map(|i| {
            views.map(|view| Row {
                label: Some(i as i64),
                ..row(&header, i * 2 + usize::from(view.ends_with("flip")), &format!("{i}.png"), Some(view))
            })
        })
        .collect();
    let images = all.clone();
    let second = all.split_off(7);
    let bench = bench_with(&header, &[all, second]);
    let run = bench.run("export set -o out --to llamagen-c2i").exits(0).says(&["change it to 7", "`flip`"]);
    assert_eq!(run.summary()["documents"], 7);
    for (i, pair) in images.chunks(2).enumerate() {
        let (shape, values) = int64s(&bench.bytes(&format!("out/imagenet32_codes/{i}.npy")));
        assert_eq!(shape, [1, 2, 16]);
        let expected: Vec<_> = pair.iter().flat_map(codes).map(u64::from).collect();
        assert_eq!(values, expected);
        assert_eq!(int64s(&bench.bytes(&format!("out/imagenet32_labels/{i}.npy"))), (vec![1], vec![i as u64]));
    }
    assert_eq!(bench.tree("out").len(), 7 * 2 + 2);
    check_row_index(&bench, "out", &images.iter().step_by(2).collect::<Vec<_>>());
    assert_eq!(json_of(&bench.bytes("out/export.json"))["views"], json!(views));
}

#[test]
fn an_image_with_other_views_is_named() {
    let header = header(64, 1, Some((2, 2)));
    let rows = vec![
        row(&header, 0, "a.png", Some("32x32")),
        row(&header, 1, "a.png", Some("32x32/flip")),
        row(&header, 2, "b.png", Some("32x32")),
    ];
    let bench = bench_with(&header, &[rows]);
    bench.run("export set -o out --to llamagen-c2i").exits(1).says(&["b.png has the views 32x32, but", "32x32/flip"]);
    // The same file twice is two images.
    let twice = vec![row(&header, 0, "a.png", None), row(&header, 0, "a.png", None)];
    let bench = bench_with(&header, &[twice]);
    assert_eq!(bench.run("export set -o out --to llamagen-c2i --name x").exits(0).summary()["documents"], 2);
    assert_eq!(int64s(&bench.bytes("out/x_codes/1.npy")).0, [1, 1, 4]);
}

#[test]
fn llamagen_finds_the_codes_of_every_line_of_its_lists() {
    let header = header(64, 1, Some((2, 3)));
    let shards = rows(&header, 2, 4);
    let bench = bench_with(&header, &shards);
    bench.run("export set -o out --to llamagen-t2i").exits(0);
    for (list, rows) in shards.iter().enumerate() {
        let images: Vec<_> = rows.iter().filter(|row| row.codes.is_some()).collect();
        let told = lines(&bench.bytes(&format!("out/{list:05}.jsonl")));
        assert_eq!(told.len(), images.len());
        for (i, (line, row)) in told.iter().zip(images).enumerate() {
            assert_eq!((&line["image_path"], &line["text"][0]), (&json!(row.path), &json!(row.caption)));
            let (shape, values) = int64s(&bench.bytes(&format!("out/{list:05}/{i}.npy")));
            assert_eq!((shape, values), (vec![1, 6], codes(row).into_iter().map(u64::from).collect()));
        }
    }
}

#[test]
fn frames_of_1xgpt_are_one_array_with_clips() {
    for (k, width, dtype) in [(65_536, 2, "uint16"), (1 << 18, 4, "uint32")] {
        let header = header(k, 1, Some((3, 3)));
        let shards = rows(&header, 3, 4);
        let bench = bench_with(&header, &shards);
        bench.run("export set -o out --to 1xgpt --hz 2.5").exits(0);
        let metadata = json_of(&bench.bytes("out/metadata.json"));
        let expected =
            json!({ "num_images": 9, "s": 3, "h": 3, "w": 3, "token_dtype": dtype, "vocab_size": k, "hz": 2.5 });
        assert_eq!(metadata, expected);
        let video = bench.bytes("out/video.bin");
        let video = if width == 2 { numbers::<2>(&video) } else { numbers::<4>(&video) };
        let images = with_codes(&shards);
        assert_eq!(video, images.iter().flat_map(|row| codes(row)).map(u64::from).collect::<Vec<_>>());
        // A folder is a clip.
        assert_eq!(numbers::<4>(&bench.bytes("out/segment_ids.bin")), [0, 0, 0, 1, 1, 1, 2, 2, 2]);
        check_row_index(&bench, "out", &images);
    }
}

#[test]
fn shards_in_another_layout_are_a_set_again() {
    let header = header(64, 2, Some((2, 3)));
    let shards = rows(&header, 3, 4);
    let bench = bench_with(&header, &shards);
    bench.run("export set -o lines --to jsonl").exits(0);
    let set = CodeSet::open(bench.path("lines")).expect("a set");
    set.check_complete().expect("complete");
    assert_eq!((set.manifest().layout, &set.manifest().header), (Layout::Jsonl, &header));
    let read: Vec<Row> = set.rows().collect::<vqrae::Result<_>>().expect("rows");
    assert_eq!(read.iter().collect::<Vec<_>>(), with_codes(&shards));
    for stats in set.shards() {
        let bytes = std::fs::read(set.file(stats)).expect("a shard");
        assert_eq!(
            (stats.bytes, stats.blake3.clone()),
            (bytes.len() as u64, blake3::hash(&bytes).to_hex().to_string())
        );
    }
    if LAYOUT == Layout::Parquet {
        bench.run("export set -o direct --to parquet").exits(0);
        bench.run("export lines -o around --to parquet").exits(0);
        for name in ["00000.parquet", "00001_stats.json", "manifest.json"] {
            assert!(bench.bytes(&format!("direct/{name}")) == bench.bytes(&format!("around/{name}")), "{name}");
        }
        let rows: Vec<Row> = Reader::open(bench.path("direct/00001.parquet"))
            .expect("a shard")
            .collect::<vqrae::Result<_>>()
            .expect("rows");
        assert_eq!(rows.iter().collect::<Vec<_>>(), with_codes(&shards[1..2]));
    }
    bench.run("export set -o tars --to wds").exits(0);
    let tar = bench.bytes("tars/00002.tar");
    let first = shards[2][0].key.clone();
    assert_eq!(&tar[..first.len() + 4], format!("{first}.cls").as_bytes());
    bench.run("export tars -o again --to npy").exits(1).says(&["a tar of codes is for webdataset"]);
}

#[test]
fn a_file_an_image_is_what_tokenize_writes_for_a_photo() {
    let header = header(64, 1, Some((2, 2)));
    let rows = vec![
        row(&header, 0, "cats/tom.jpg", Some("32x32")),
        row(&header, 1, "cats/tom.jpg", Some("32x32/flip")),
        row(&header, 2, "dogs/rex.jpg", None),
    ];
    let bench = bench_with(&header, std::slice::from_ref(&rows));
    for format in ["npy", "safetensors"] {
        bench.run(&format!("export set -o {format} --to {format}")).exits(0);
        for (name, row) in ["cats/tom.jpg@32x32", "cats/tom.jpg@32x32-flip", "dogs/rex.jpg"].iter().zip(&rows) {
            let read = Codes::read(bench.path(&format!("{format}/codes/{name}.{format}"))).expect(name);
            assert_eq!(Some(read), row.to_codes(&header));
        }
    }
}

#[test]
fn what_a_layout_cannot_hold_is_refused_with_a_next_step() {
    let square = header(64, 1, Some((2, 2)));
    let mut rows = vec![row(&square, 0, "a.png", None), row(&square, 1, "b.png", None)];
    rows[1].label = None;
    rows[1].caption = None;
    let bench = bench_with(&square, &[rows]);
    for to in ["llamagen-c2i", "rar"] {
        bench.run(&format!("export set -o out --to {to}")).exits(1).says(&["(b.png) has no label", "--labels"]);
    }
    bench.run("export set -o out --to llamagen-t2i").exits(1).says(&["(b.png) has no caption"]);
    bench.run("export set -o out --to 1xgpt --id-offset 3").exits(1).says(&["1xgpt holds codes as they are"]);
    bench.run("export set -o out --to npy --hz 3").exits(1).says(&["--hz is for 1xgpt"]);
    let mega = "export set -o out --to megatron";
    bench.run(&format!("{mega} --id-offset 4294967290")).exits(1).says(&["32 bits do not hold"]);
    bench.run(&format!("{mega} --end 2147483648")).exits(1).says(&["do not fit into int32"]);
    bench.run(&format!("{mega} --row-end 63")).exits(1).says(&["--row-end 63 is the id of a code: these are 0 to 63"]);
    bench.run(&format!("{mega} --vocab-size 63")).exits(1).says(&["ids go up to 63"]);
    bench.run(&format!("{mega} --name a/b")).exits(2).says(&["a name without folders"]);
    bench.run(&format!("{mega} --name ..")).exits(2);
    bench.run("export set -o out --to parchment").exits(2).says(&["llamagen-c2i"]);

    let bench = bench_with(&header(64, 1, Some((2, 3))), &rows_of(&header(64, 1, Some((2, 3)))));
    bench.run("export set -o out --to 1xgpt").exits(1).says(&["square grids, but these are 2x3"]);
    let bench = bench_with(&header(64, 2, Some((2, 2))), &rows_of(&header(64, 2, Some((2, 2)))));
    bench.run("export set -o out --to 1xgpt").exits(1).says(&["one code a token"]);
    let bench = bench_with(&header(64, 1, None), &rows_of(&header(64, 1, None)));
    for to in ["llamagen-c2i", "llamagen-t2i", "titok-jsonl", "1xgpt"] {
        bench.run(&format!("export set -o out --to {to}")).exits(1).says(&["every image of this set has its own"]);
    }
    assert!(!bench.path("out").exists());
}

fn rows_of(header: &Header) -> Vec<Vec<Row>> {
    rows(header, 1, 3)
}

/// Nothing of an export that failed is left.
#[track_caller]
pub(super) fn leaves_nothing(bench: &Bench, run: Run) -> Run {
    let names =
        std::fs::read_dir(bench.path("")).expect("the folder").map(|entry| entry.expect("an entry").file_name());
    let left: Vec<_> = names.filter(|name| name != "set" && name != "model").collect();
    assert!(left.is_empty(), "{left:?} is left: {}", run.stderr);
    run
}

#[test]
fn a_set_that_is_damaged_or_incomplete_is_no_export() {
    let header = header(64, 1, Some((2, 2)));
    let shards = rows(&header, 3, 4);
    let export = "export set -o out --to megatron";
    let file = |bench: &Bench, i: usize| shard::file(&bench.path("set"), &format!("{i:05}"), LAYOUT);

    let bench = bench_with(&header, &shards);
    let whole = std::fs::read(file(&bench, 1)).expect("a shard");
    for length in [0, 3, whole.len() / 2, whole.len() - 1] {
        std::fs::write(file(&bench, 1), &whole[..length]).expect("a file");
        leaves_nothing(&bench, bench.run(export).exits(1).says(&["00001."]));
    }
    std::fs::remove_file(file(&bench, 1)).expect("a shard");
    leaves_nothing(&bench, bench.run(export).exits(1).says(&["00001."]));

    // One shard of another model, and of another codebook.
    for other in [Header { model_id: "ffff".into(), ..header.clone() }, Header { codebook_size: 32, ..header.clone() }]
    {
        if LAYOUT == Layout::Parquet {
            write_shard(&bench, "set", &other, "00001", 3, &rows(&other, 1, 4)[0]);
            leaves_nothing(&bench, bench.run(export).exits(1).says(&["00001.parquet"]));
        }
    }

    let bench = bench_with(&header, &shards);
    let stats = Stats::read(&bench.path("set"), "00001").expect("statistics").expect("statistics");
    Stats { rows: 9, ..stats.clone() }.write(&bench.path("set")).expect("statistics");
    let says = ["4 rows, 1 of them without codes", "00001_stats.json says 9 and 1"];
    leaves_nothing(&bench, bench.run(export).exits(1).says(&says));
    Stats { errors: 0, ..stats }.write(&bench.path("set")).expect("statistics");
    leaves_nothing(&bench, bench.run(export).exits(1).says(&["says 4 and 0"]));
    bench.write("set/00001_stats.json", b"{");
    leaves_nothing(&bench, bench.run(export).exits(1).says(&["00001_stats.json"]));

    std::fs::remove_file(bench.path("set/00001_stats.json")).expect("statistics");
    let says = ["1 of 3 shards are not finished, the first: 00001", "--allow-incomplete"];
    leaves_nothing(&bench, bench.run(export).exits(1).says(&says));
    let run = bench.run(&format!("{export} --allow-incomplete")).exits(0);
    assert_eq!(run.summary()["documents"], 6);
    assert_eq!(json_of(&bench.bytes("out/export.json"))["missing_shards"], json!(["00001"]));

    bench.run("export nowhere -o none --to npy").exits(1).says(&["nowhere"]);
    bench.run("export out -o none --to npy").exits(1).says(&["no manifest.json"]);
    let mut manifest = json_of(&bench.bytes("set/manifest.json"));
    manifest["index_base"] = 1.into();
    bench.write("set/manifest.json", manifest.to_string().as_bytes());
    bench.run("export set -o none --to npy --allow-incomplete").exits(1).says(&["raster from 0"]);
}

#[test]
fn codes_beyond_the_codebook_and_lines_cut_short_are_no_export() {
    let header = header(64, 1, Some((2, 2)));
    let bench = bench_with(&header, &rows(&header, 1, 9));
    bench.run("export set -o lines --to jsonl").exits(0);
    let (manifest, shard) = (bench.bytes("lines/manifest.json"), bench.bytes("lines/00000.jsonl"));
    let mut smaller = json_of(&manifest);
    smaller["codebook_size"] = 32.into();
    bench.write("lines/manifest.json", smaller.to_string().as_bytes());
    let export = "export lines -o out --to megatron";
    bench.run(export).exits(1).says(&["00000.jsonl", "but the codebook has 32 rows"]);
    bench.write("lines/manifest.json", &manifest);
    bench.write("lines/00000.jsonl", &shard[..shard.len() - 5]);
    bench.run(export).exits(1).says(&["00000.jsonl: line 8"]);
    bench.write("lines/00000.jsonl", &shard);
    assert!(!bench.path("out").exists());
    bench.run(export).exits(0);
}

#[test]
fn machines_are_told_in_json() {
    let header = header(64, 1, Some((2, 2)));
    let bench = bench_with(&header, &rows(&header, 1, 4));
    let run = bench.run("export set -o out --to llamagen-c2i --log-format json").exits(0);
    let summary = run.summary();
    assert_eq!((&summary["layout"], &summary["output"]), (&"llamagen-c2i".into(), &"out".into()));
    assert!(summary["seconds"].is_number() && summary["rows_per_second"].is_number());
    let told: Vec<Value> = run.stderr.lines().map(|line| json_of(line.as_bytes())).collect();
    assert!(told.iter().any(|event| event["message"] == "1 row without codes was left out"), "{told:?}");
}

#[test]
fn a_set_without_codes_is_no_export() {
    let header = header(64, 1, Some((2, 2)));
    let broken = rows(&header, 1, 2)[0][1].clone();
    let bench = bench_with(&header, &[vec![broken]]);
    for to in ["megatron", "datatrove", "webdataset", "npy", "1xgpt", "llamagen-c2i"] {
        leaves_nothing(
            &bench,
            bench.run(&format!("export set -o out --to {to}")).exits(1).says(&["none of 1 rows has codes"]),
        );
    }
}

#[test]
fn no_path_of_a_set_leads_out_of_the_output() {
    let header = header(64, 1, Some((2, 2)));
    for path in ["../escaped", "/escaped", "a/../../escaped"] {
        let bench = bench_with(&header, &[vec![row(&header, 0, path, None)]]);
        leaves_nothing(
            &bench,
            bench.run("export set -o out --to npy").exits(1).says(&["would lead out of the output folder"]),
        );
    }
    let twice = vec![row(&header, 0, "a.png", None), row(&header, 1, "a.png", None)];
    let bench = bench_with(&header, &[twice]);
    bench.run("export set -o out --to npy").exits(1).says(&["two rows of the set have the path a.png"]);
}

#[test]
fn what_is_there_is_replaced_only_on_demand_and_only_if_it_is_an_export() {
    let header = header(64, 1, Some((2, 2)));
    let bench = bench_with(&header, &rows(&header, 1, 4));
    bench.run("export set -o sub/folder/out --to megatron").exits(0);
    let before = bench.tree("sub");
    bench.run("export set -o sub/folder/out --to datatrove").exits(1).says(&["exists; pass --overwrite"]);
    assert!(bench.tree("sub") == before);
    bench.run("export set -o sub/folder/out --to datatrove --overwrite").exits(0);
    assert!(bench.path("sub/folder/out/codes.ds").exists() && !bench.path("sub/folder/out/codes.idx").exists());
    assert_eq!(bench.path("sub/folder").read_dir().expect("a folder").count(), 1);
    // An export that fails leaves the one before it.
    let before = bench.tree("sub");
    bench.run("export set -o sub/folder/out --to megatron --overwrite --row-end 3").exits(1);
    assert!(bench.tree("sub") == before);

    bench.write("precious/photo.jpg", b"the only copy");
    bench.run("export set -o precious --to npy --overwrite").exits(1).says(&["exists and is no export"]);
    bench.run("export set -o set --to jsonl --overwrite").exits(1).says(&["set is the set itself"]);
    std::fs::create_dir(bench.path("empty")).expect("a folder");
    bench.run("export set -o empty --to npy").exits(0);
    assert_eq!(bench.bytes("precious/photo.jpg"), b"the only copy");

    // A link stays one: what it leads to is replaced.
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("sub/folder/out", bench.path("link")).expect("a link");
        bench.run("export set -o link --to megatron --overwrite").exits(0);
        assert!(bench.path("link").is_symlink() && bench.path("sub/folder/out/codes.idx").exists());
        assert_eq!(bench.path("sub/folder").read_dir().expect("a folder").count(), 1);
    }
}

/// A disk that is full, played by a limit on the size of a file.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_that_names_the_file() {
    let header = header(64, 1, Some((32, 32)));
    let bench = bench_with(&header, &rows(&header, 1, 40));
    for (to, file) in [
        ("megatron", "out/codes.bin"),
        ("datatrove", "out/codes.ds"),
        ("rar", "out/codes.jsonl"),
        ("1xgpt", "out/video.bin"),
        ("jsonl", "out/00000.jsonl"),
        ("webdataset", "out/00000.tar"),
        ("llamagen-c2i", "out/imagenet32_codes/0.npy"),
        ("npy", "out/codes/0/0000.png.npy"),
    ] {
        let limit = if matches!(to, "llamagen-c2i" | "npy") { 2 } else { 40 };
        let mut command = Command::new("sh");
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" export set -o out --to {to}");
        command.args(["-c", &script, BINARY]).current_dir(bench.path(""));
        leaves_nothing(&bench, finish(command).exits(1).says(&[file, "too large"]));
    }
}

/// Whenever it is killed, the output is whole or not there.
#[cfg(target_os = "linux")]
#[test]
fn an_export_that_is_killed_is_not_there() {
    let header = header(64, 1, Some((2, 2)));
    let bench = bench_with(&header, &rows(&header, 3, 200));
    let line = |out: &str| format!("export set -o {out} --to llamagen-c2i");
    let started = std::time::Instant::now();
    bench.run(&line("whole")).exits(0);
    let time = started.elapsed();
    let whole = bench.tree("whole");
    let drafts = || -> Vec<PathBuf> {
        let names = bench.path("").read_dir().expect("a folder").map(|entry| entry.expect("an entry").path());
        names
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".export-")))
            .collect()
    };
    for (attempt, signal) in ["KILL", "TERM", "KILL", "INT", "KILL"].iter().enumerate() {
        let before = drafts();
        let mut child =
            bench.command(&line("out")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary");
        std::thread::sleep(time * (attempt as u32 * 3 + 1) / 20);
        let kill = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(kill.expect("kill").success());
        let status = child.wait().expect("the binary");
        if bench.path("out").exists() {
            assert!(bench.tree("out") == whole, "attempt {attempt}");
            std::fs::remove_dir_all(bench.path("out")).expect("a folder");
        } else {
            assert!(!status.success());
        }
        // Only SIGKILL leaves what was being written, under another name, until the next export.
        let left: Vec<PathBuf> = drafts().into_iter().filter(|path| !before.contains(path)).collect();
        assert!(left.is_empty() || *signal == "KILL", "{signal} leaves {left:?}");
    }
    bench.run(&line("out")).exits(0);
    assert!(bench.tree("out") == whole && drafts().is_empty());
}
