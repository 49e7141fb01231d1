//! Shards end to end: what goes in, what comes out, and that nothing but the images decides the bytes.

use std::io::Write as _;
use std::process::Stdio;

use serde_json::Value;
use vqrae::codes::shard::Reader;
use vqrae::codes::{CodeSet, Row};

use super::{BINARY, Bench, fixture};

/// Every file of a folder but hidden ones, of which none may be left.
fn bytes_of(bench: &Bench, folder: &str) -> std::collections::BTreeMap<std::path::PathBuf, Vec<u8>> {
    let tree = bench.tree(folder);
    let hidden: Vec<_> = tree.keys().filter(|path| path.to_string_lossy().starts_with('.')).collect();
    assert!(hidden.is_empty(), "left behind: {hidden:?}");
    tree
}

fn rows(bench: &Bench, folder: &str) -> Vec<Row> {
    let set = CodeSet::open(bench.path(folder)).expect("a set");
    set.check_complete().expect("all shards");
    set.rows().collect::<Result<_, _>>().expect("rows")
}

impl Bench {
    /// A tar of members.
    fn make_tar(&self, name: &str, members: &[(&str, Vec<u8>)]) {
        let mut builder = tar::Builder::new(Vec::new());
        for (member, bytes) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            // As it stands: the crate would refuse a name that leaves the folder.
            header.as_old_mut().name[..member.len()].copy_from_slice(member.as_bytes());
            header.set_cksum();
            builder.append(&header, bytes.as_slice()).expect("a member");
        }
        self.write(name, &builder.into_inner().expect("a tar"));
    }

    /// Three tars of `count` photos each, of which one is corrupt, with labels and captions.
    fn make_tars(&self, count: usize) {
        for t in 0..3 {
            let mut members = Vec::new();
            for i in 0..count {
                self.make_photo("photo.jpg", t * count + i);
                let bytes = if i == 2 { b"no photo".to_vec() } else { self.bytes("photo.jpg") };
                let key = format!("{t:02}{i:04}");
                members.push((format!("{key}.cls"), (i % 5).to_string().into_bytes()));
                members.push((format!("{key}.jpg"), bytes));
                members.push((format!("{key}.txt"), format!("wave {i}").into_bytes()));
            }
            let members: Vec<(&str, Vec<u8>)> = members.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
            self.make_tar(&format!("tars/{t:05}.tar"), &members);
        }
    }
}

#[test]
fn a_folder_becomes_shards_of_sorted_images() {
    let bench = Bench::with_photos(7);
    bench.write("photos/cats/0002.jpg", b"no photo");
    let run = bench.run("tokenize photos -o out --model model --samples-per-shard 3 --dtype f32").exits(3);
    let summary = run.says(&["skipped photos/cats/0002.jpg: ", "their rows say why"]).summary();
    assert_eq!((&summary["images"], &summary["skipped"], &summary["shards"]["of"]), (&7.into(), &1.into(), &3.into()));
    let rows = rows(&bench, "out");
    let paths: Vec<_> = rows.iter().map(|row| row.path.as_str()).collect();
    let mut sorted = paths.clone();
    sorted.sort();
    assert_eq!((paths.len(), &paths), (8, &sorted));
    assert_eq!((rows[0].key.as_str(), rows[3].key.as_str()), ("000000000", "000010000"));
    let bad = rows.iter().find(|row| row.path == "cats/0002.jpg").expect("its own row");
    assert!(bad.codes.is_none() && bad.error.as_deref().is_some_and(|error| error.contains("not a JPEG")), "{bad:?}");
    // The same codes as those of single files, whose bytes other tests pin.
    bench.run("tokenize --output-format safetensors photos -o files --model model --dtype f32").exits(3);
    for row in rows.iter().filter(|row| row.codes.is_some()) {
        let codes =
            vqrae::codes::Codes::read(bench.path(&format!("files/codes/{}.safetensors", row.path))).expect("codes");
        assert_eq!((Some(&codes.indices), codes.h, codes.w), (row.codes.as_ref(), row.h as usize, row.w as usize));
        assert_eq!(
            (row.width, row.height),
            (Some(60 + row.path[row.path.len() - 8..][..4].parse::<u32>().unwrap() % 7), Some(45))
        );
    }
    let manifest: Value = serde_json::from_slice(&bench.bytes("out/manifest.json")).expect("JSON");
    assert_eq!((&manifest["model_id"], &manifest["dtype"]), (&bench.id("model").into(), &"f32".into()));
    assert_eq!((&manifest["grid"], &manifest["order"]), (&serde_json::json!([4, 4]), &"raster".into()));
    let stats: Value = serde_json::from_slice(&bench.bytes("out/00000_stats.json")).expect("JSON");
    assert_eq!((&stats["rows"], &stats["ok"], &stats["shards"]), (&3.into(), &3.into(), &3.into()));
}

#[test]
fn the_bytes_are_the_same_for_any_batch_rank_thread_and_layout_of_work() {
    let bench = Bench::with_photos(11);
    let line = "tokenize photos --model model --samples-per-shard 2 -o";
    bench.run(&format!("{line} one")).exits(0);
    let expected = bytes_of(&bench, "one");
    bench.run(&format!("{line} small --batch-size 1 --num-workers 3 --device cpu,cpu")).exits(0);
    assert!(bytes_of(&bench, "small") == expected);
    for n in [2, 3, 8] {
        let out = format!("n{n}");
        for i in (0..n).rev() {
            bench.run(&format!("{line} {out} --shard-index {i} --num-shards {n}")).exits(0);
        }
        assert!(bytes_of(&bench, &out) == expected, "{n} ranks");
    }
    // Planned once; the processes of launchers find their numbers themselves.
    let launchers: [&[&[(&str, &str)]]; 3] = [
        &[&[("RANK", "0"), ("WORLD_SIZE", "2")], &[("RANK", "1"), ("WORLD_SIZE", "2")]],
        &[
            &[("SLURM_ARRAY_TASK_ID", "5"), ("SLURM_ARRAY_TASK_MIN", "5"), ("SLURM_ARRAY_TASK_COUNT", "2")],
            &[("SLURM_ARRAY_TASK_ID", "6"), ("SLURM_ARRAY_TASK_MIN", "5"), ("SLURM_ARRAY_TASK_COUNT", "2")],
        ],
        &[&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2")], &[("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")]],
    ];
    for (number, processes) in launchers.iter().enumerate() {
        let out = format!("launched{number}");
        bench.run(&format!("{line} {out} --plan")).exits(0);
        for process in *processes {
            let mut command = bench.command(&format!("{line} {out}"));
            command.envs(process.iter().copied());
            super::finish(command).exits(0).says(&["process ", " of 2 (", "as planned"]);
        }
        std::fs::remove_file(bench.path(&format!("{out}/plan.jsonl"))).expect("the plan");
        assert!(bytes_of(&bench, &out) == expected, "{processes:?}");
    }
    for i in ["0", "1"] {
        let mut command = bench.command(&format!("{line} pods --num-shards 2"));
        command.env("JOB_COMPLETION_INDEX", i);
        super::finish(command).exits(0).says(&["JOB_COMPLETION_INDEX"]);
    }
    assert!(bytes_of(&bench, "pods") == expected);
}

#[test]
fn tars_become_shards_of_their_names_with_labels_and_captions() {
    let bench = Bench::new();
    bench.make_tars(6);
    let run = bench.run("tokenize tars/00000.tar tars/00001.tar tars/00002.tar -o out --model model").exits(3);
    run.says(&["skipped tars/00001.tar/010002.jpg: "]);
    let rows = rows(&bench, "out");
    assert_eq!(rows.len(), 18);
    let row = &rows[7];
    assert_eq!((row.key.as_str(), row.path.as_str()), ("000010001", "00001.tar/010001.jpg"));
    assert_eq!((row.label, row.caption.as_deref()), (Some(1), Some("wave 1")));
    assert!(rows[8].error.is_some() && rows[8].label == Some(2));
    // A tar by itself, a tar by a pattern, and a tar on standard input.
    let expected = bytes_of(&bench, "out");
    for i in 0..3 {
        bench.run(&format!("tokenize tars/0000{i}.tar -o alone --model model")).exits(3);
    }
    assert!(bytes_of(&bench, "alone") == expected);
    bench.run("tokenize tars -o folder --model model --input-format webdataset").exits(3);
    assert!(bytes_of(&bench, "folder") == expected);
    let mut child = bench
        .command("tokenize - --stdin-name 00001 -o stdin --model model")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary");
    child.stdin.take().expect("a pipe").write_all(&bench.bytes("tars/00001.tar")).expect("the tar");
    assert_eq!(child.wait().expect("the end").code(), Some(3));
    let piped: Vec<Row> = CodeSet::open(bench.path("stdin")).unwrap().rows().map(Result::unwrap).collect();
    assert_eq!(piped.len(), 6);
    assert!(piped.iter().zip(&rows[6..]).all(|(a, b)| (a.codes == b.codes, &a.key) == (true, &b.key)));
}

#[test]
fn lists_name_images_with_captions_and_labels() {
    let bench = Bench::with_photos(3);
    let list = "photos/cats/0001.jpg\n{\"path\": \"photos/0000.png\", \"caption\": \"zero\", \"label\": 4}\n";
    bench.write("list.jsonl", list.as_bytes());
    bench.run("tokenize --files-from list.jsonl -o out --model model").exits(0);
    let rows = rows(&bench, "out");
    let facts: Vec<_> = rows.iter().map(|row| (row.path.as_str(), row.label, row.caption.as_deref())).collect();
    assert_eq!(facts, [("photos/0000.png", Some(4), Some("zero")), ("photos/cats/0001.jpg", None, None)]);
    let mut child = bench
        .command("tokenize --files-from - -0 -o piped --model model")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("the binary");
    child.stdin.take().expect("a pipe").write_all(b"photos/cats/0001.jpg\0photos/0000.png\0").expect("a list");
    assert!(child.wait().expect("the end").success());
    let piped = self::rows(&bench, "piped");
    assert!(piped.iter().zip(&rows).all(|(a, b)| (&a.codes, &a.path) == (&b.codes, &b.path)));
    bench.write("list.txt", b"../escape.jpg\n");
    bench.run("tokenize --files-from list.txt -o no --model model").exits(1).says(&["list the absolute path"]);
}

#[test]
fn folders_are_labels_as_in_imagefolder() {
    let bench = Bench::new();
    for (i, name) in ["dog/1.png", "cat/1.png", "cat/2.png"].iter().enumerate() {
        bench.make_photo(&format!("photos/{name}"), i);
    }
    bench.run("tokenize photos -o out --model model").exits(0);
    let facts: Vec<_> = rows(&bench, "out").into_iter().map(|row| (row.label, row.class)).collect();
    let class = |label, name: &str| (Some(label), Some(name.to_string()));
    assert_eq!(facts, [class(0, "cat"), class(0, "cat"), class(1, "dog")]);
    let manifest: Value = serde_json::from_slice(&bench.bytes("out/manifest.json")).expect("JSON");
    assert_eq!(manifest["classes"], serde_json::json!(["cat", "dog"]));
    bench.run("tokenize photos -o plain --model model --labels none").exits(0);
    assert!(rows(&bench, "plain").iter().all(|row| row.label.is_none() && row.class.is_none()));
    // A new class moves the labels behind it, so their shards are made again.
    bench.make_photo("photos/bee/1.png", 9);
    bench.run("tokenize photos -o out --model model").exits(0);
    assert_eq!(rows(&bench, "out").iter().map(|row| row.label).collect::<Vec<_>>(), [0, 1, 1, 2].map(Some));
}

#[test]
fn every_layout_holds_the_same_rows() {
    let bench = Bench::new();
    bench.make_tars(4);
    let line = "tokenize tars/00000.tar --model model -o";
    bench.run(&format!("{line} parquet")).exits(3);
    bench.run(&format!("{line} jsonl --output-format jsonl")).exits(3);
    bench.run(&format!("{line} wds --output-format webdataset")).exits(3);
    let expected = rows(&bench, "parquet");
    assert_eq!(rows(&bench, "jsonl"), expected);
    assert!(Reader::open(bench.path("jsonl/00000.jsonl")).err().unwrap().to_string().contains("name their folder"));
    let tar = bench.bytes("wds/00000.tar");
    let mut archive = tar::Archive::new(tar.as_slice());
    let names: Vec<_> =
        archive.entries().unwrap().map(|e| e.unwrap().path().unwrap().to_string_lossy().into_owned()).collect();
    assert_eq!(names[..4], ["000000000.cls", "000000000.codes.npy", "000000000.json", "000000000.txt"]);
    // The corrupt one has no codes.
    assert!(!names.contains(&"000000002.codes.npy".to_string()) && names.contains(&"000000002.json".to_string()));
    for layout in ["parquet", "jsonl", "wds"] {
        let told: Value = serde_json::from_str(&bench.run(&format!("verify {layout}")).exits(0).stdout).expect("JSON");
        assert_eq!((&told["rows"], &told["errors"], &told["wrong"]), (&4.into(), &1.into(), &0.into()), "{layout}");
    }
}

#[test]
fn shards_become_pictures_again() {
    let bench = Bench::with_photos(5);
    bench
        .run("tokenize photos -o out --model model --samples-per-shard 2 --reconstruct --sheet out/sheet.png")
        .exits(0);
    bench.run("reconstruct out -o again --model model").exits(0);
    assert!(bench.tree("out/reconstructions") == bench.tree("again/reconstructions"));
    bench.run("reconstruct out/00001.parquet -o part --model model").exits(0);
    assert_eq!(bench.tree("part/reconstructions").len(), 2);
    bench.make_model("other", 2);
    bench.run("reconstruct out -o no --model other").exits(1).says(&["these codes were made by model"]);
    bench.run("codebook out -o book --model model").exits(0);
    let told: Value = serde_json::from_str(&bench.run("inspect out --json").exits(0).stdout).expect("JSON");
    assert_eq!((&told["rows"], &told["missing_shards"]), (&5.into(), &0.into()));
    let told: Value =
        serde_json::from_str(&bench.run("inspect out/00000.parquet --json").exits(0).stdout).expect("JSON");
    assert_eq!((&told["rows"], &told["codebook_size"]), (&2.into(), &64.into()));
}

#[test]
fn an_image_may_have_several_rows() {
    let bench = Bench::with_photos(3);
    bench.run("tokenize photos -o flip --model model --flip").exits(0);
    let flipped = rows(&bench, "flip");
    let views: Vec<_> = flipped[..2].iter().map(|row| (row.key.as_str(), row.view.as_deref())).collect();
    assert_eq!(views, [("000000000-0", Some("centre")), ("000000000-1", Some("centre-flip"))]);
    bench.run("tokenize photos -o plain --model model").exits(0);
    let plain = rows(&bench, "plain");
    assert!(
        plain
            .iter()
            .zip(flipped.chunks(2))
            .all(|(plain, pair)| plain.codes == pair[0].codes && pair[0].codes != pair[1].codes)
    );
    bench.run("tokenize photos -o ten --model model --ten-crop --crop-range 1.25 --samples-per-shard 2").exits(0);
    let ten = rows(&bench, "ten");
    assert_eq!((ten.len(), ten[9].view.as_deref()), (30, Some("centre-flip")));
    let manifest: Value = serde_json::from_slice(&bench.bytes("ten/manifest.json")).expect("JSON");
    assert_eq!(manifest["augmentations"], serde_json::json!(["ten-crop-1.25"]));
    bench.run("verify ten --images photos --model model --ten-crop --crop-range 1.25").exits(0);
    bench.run("tokenize photos -o ten --model model").exits(1).says(&["this folder holds the work of model"]);
    bench.run("reconstruct ten -o pictures --model model").exits(0);
    assert_eq!(bench.tree("pictures/reconstructions").len(), 30);
    bench.run("tokenize photos -o sizes --model model --resolution 32,64 --flip").exits(0);
    let sizes = rows(&bench, "sizes");
    assert_eq!((sizes.len(), sizes[3].view.as_deref(), sizes[3].h), (12, Some("64x64-centre-flip"), 8));
}

#[test]
fn what_is_done_is_kept_and_what_changed_is_done_again() {
    let bench = Bench::with_photos(6);
    let line = "tokenize photos -o out --model model --samples-per-shard 2";
    bench.run(line).exits(0);
    let first = bytes_of(&bench, "out");
    let summary = bench.run(line).exits(0).says(&["3 of 3 shards were done before"]).summary();
    assert_eq!((&summary["images"], &summary["resumed"]), (&0.into(), &6.into()));
    assert!(bytes_of(&bench, "out") == first);
    // A shard that lost its end, one that lost its statistics, and one whose statistics are damaged.
    let whole = bench.bytes("out/00000.parquet");
    bench.write("out/00000.parquet", &whole[..whole.len() - 9]);
    std::fs::remove_file(bench.path("out/00001_stats.json")).unwrap();
    bench.write("out/00002_stats.json", b"{");
    assert_eq!(bench.run(line).exits(0).summary()["images"], 6);
    assert!(bytes_of(&bench, "out") == first);
    // More photos: shards before the first new one stay.
    bench.make_photo("photos/cats/zz.png", 70);
    let summary = bench.run(line).exits(0).summary();
    assert!(summary["resumed"].as_u64() > Some(0), "{summary}");
    assert_eq!(rows(&bench, "out").len(), 7);
    // Fewer: the last shard of before would stay beside the others.
    for name in ["photos/cats/zz.png", "photos/0000.png", "photos/0003.jpg"] {
        std::fs::remove_file(bench.path(name)).unwrap();
    }
    bench.run(line).exits(1).says(&["00002.parquet: a shard of a longer list", "--if-exists overwrite"]);
    bench.run(&format!("{line} --if-exists overwrite")).exits(0);
    assert_eq!(rows(&bench, "out").len(), 4);
    bench.run(&format!("{line} --if-exists error")).exits(1).says(&["manifest.json exists"]);
}

#[test]
fn a_folder_of_another_making_is_refused() {
    let bench = Bench::with_photos(2);
    bench.make_model("other", 2);
    bench.run("tokenize photos -o out --model model --dtype f32").exits(0);
    let refused = [
        ("--model other --dtype f32", "this folder holds the work of model "),
        ("--model model --dtype bf16", "pass --dtype f32 to go on as before"),
        ("--model model --dtype f32 --resolution 64", "this folder holds the work of model "),
        ("--model model --dtype f32 --samples-per-shard 5", "--samples-per-shard was 10000"),
        ("--model model --dtype f32 --output-format jsonl", "--output-format was Parquet"),
        ("--model model --dtype f32 --output-format safetensors", "this folder holds code shards"),
    ];
    for (flags, words) in refused {
        bench.run(&format!("tokenize photos -o out {flags}")).exits(1).says(&[words]);
    }
    bench.run("tokenize photos -o files --model model --output-format npy").exits(0);
    bench.run("tokenize photos -o files --model model").exits(1).says(&["not the manifest of a set of code shards"]);
    bench.run("tokenize photos -o out --model model --output-format npy --plan").exits(1).says(&["a file an image"]);
}

#[test]
fn a_plan_is_the_list_for_all() {
    let bench = Bench::with_photos(5);
    let line = "tokenize photos -o out --model model --samples-per-shard 2";
    let told: Value = serde_json::from_str(&bench.run(&format!("{line} --plan")).exits(0).stdout).expect("JSON");
    assert_eq!((&told["shards"], &told["images"]), (&3.into(), &5.into()));
    // What comes later is not in the plan; what goes is an error in its row.
    bench.make_photo("photos/0009.png", 9);
    std::fs::remove_file(bench.path("photos/0000.png")).unwrap();
    bench.run(&format!("{line} --shard-index 0 --num-shards 2")).exits(3);
    bench.run("verify out").exits(1).says(&["wrong: 00001: not finished"]);
    bench.run(line).exits(0);
    let paths: Vec<_> = rows(&bench, "out").into_iter().map(|row| (row.path, row.error.is_some())).collect();
    assert!(paths.contains(&("0000.png".into(), true)) && !paths.contains(&("0009.png".into(), false)), "{paths:?}");
    bench.run("verify out").exits(0);
    bench.run("tokenize photos/cats -o out --model model --samples-per-shard 2").exits(1).says(&["planned for photos"]);
    bench.run("tokenize photos -o out --model model").exits(1).says(&["planned with --samples-per-shard 2"]);
}

#[test]
fn verify_finds_what_is_wrong() {
    let bench = Bench::with_photos(6);
    let line = "tokenize photos -o out --model model --samples-per-shard 2 --dtype f32";
    bench.run(line).exits(0);
    let told: Value =
        serde_json::from_str(&bench.run("verify out --images photos --model model --dtype f32").exits(0).stdout)
            .unwrap();
    assert_eq!((&told["encoded_again"], &told["wrong"], &told["rows"]), (&6.into(), &0.into(), &6.into()));
    bench.run("verify out --images photos --model model --dtype bf16").exits(1).says(&["were computed in f32"]);
    // Another image under the same name, one that is gone, a flipped bit, a file that nobody finished.
    bench.make_photo("photos/0000.png", 50);
    std::fs::remove_file(bench.path("photos/0003.jpg")).unwrap();
    bench.run("verify out --images photos --model model --dtype f32").exits(1).says(&[
        "0000.png (",
        "another one than was tokenized",
        "0003.jpg: not among the images",
    ]);
    let mut bytes = bench.bytes("out/00001.parquet");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    bench.write("out/00001.parquet", &bytes);
    bench.write("out/stray.parquet", b"PAR1");
    bench.run("verify out").exits(1).says(&[
        "00001.parquet: ",
        "its statistics say",
        "stray.parquet: has no statistics",
    ]);
    // A bit that its statistics were made to agree with is found by what the rows say.
    let stats = String::from_utf8(bench.bytes("out/00000_stats.json")).unwrap();
    bench.write("out/00000_stats.json", stats.replace("\"rows\": 2", "\"rows\": 3").as_bytes());
    bench.run("verify out").exits(1).says(&["2 rows, 2 of them with codes, but its statistics say 3"]);
    bench.run("verify photos").exits(1).says(&["no manifest.json: not a folder of code shards"]);
}

#[test]
fn hostile_archives_do_not_stop_a_run() {
    let bench = Bench::new();
    bench.make_tars(4);
    let whole = bench.bytes("tars/00000.tar");
    bench.write("bad/cut.tar", &whole[..whole.len() / 2 / 512 * 512 + 77]);
    bench.write("bad/empty.tar", b"");
    bench.write("bad/text.tar", b"not a tar at all, but long enough to look at; ".repeat(40).as_slice());
    bench.write("bad/empty.parquet", b"");
    bench.write("bad/text.parquet", b"PAR1 nothing PAR1");
    bench.make_tar("bad/none.tar", &[("a.txt", b"no image".to_vec())]);
    bench.make_tar("bad/escape.tar", &[("up/../../b.jpg", fixture("decode/37x29.jpg"))]);
    let words = "bad/cut.tar bad/empty.tar bad/text.tar bad/empty.parquet bad/text.parquet bad/none.tar bad/escape.tar";
    let line = format!("tokenize {words} tars/00001.tar -o out --model model --reconstruct");
    // Two files of one name become one shard.
    bench.run(&line).exits(1).says(&["would both be written as empty"]);
    std::fs::rename(bench.path("bad/empty.parquet"), bench.path("bad/empty2.parquet")).unwrap();
    std::fs::rename(bench.path("bad/text.parquet"), bench.path("bad/text2.parquet")).unwrap();
    let line = line.replace("empty.parquet", "empty2.parquet").replace("text.parquet", "text2.parquet");
    bench
        .run(&line)
        .exits(3)
        .says(&["skipped bad/cut.tar: damaged after", "skipped bad/none.tar: no member is an image"]);
    assert!(!bench.path("b.jpg.png").exists() && !bench.path("out/b.jpg.png").exists());
    bench.run("verify out").exits(0);
    let errors = rows(&bench, "out").into_iter().filter(|row| row.error.is_some()).count();
    assert!(errors >= 7, "{errors}");
    bench
        .run("tokenize bad/cut.tar -o strict --model model --strict")
        .exits(1)
        .says(&["giving up: 1 file could not be read"]);
    // A tar that is not there any more when its turn comes is tried again by the next run.
    bench.run("tokenize tars/00001.tar tars/00002.tar -o gone --model model --plan").exits(0);
    std::fs::rename(bench.path("tars/00001.tar"), bench.path("tars/kept")).unwrap();
    bench
        .run("tokenize tars/00001.tar tars/00002.tar -o gone --model model")
        .exits(3)
        .says(&["skipped tars/00001.tar: "]);
    bench.run("verify gone").exits(1).says(&["00001: planned, but not finished"]);
    std::fs::rename(bench.path("tars/kept"), bench.path("tars/00001.tar")).unwrap();
    bench.run("tokenize tars/00001.tar tars/00002.tar -o gone --model model").exits(3);
    bench.run("verify gone").exits(0);
}

#[test]
fn logs_for_machines_are_objects() {
    let bench = Bench::with_photos(4);
    bench.write("photos/bad.jpg", b"no photo");
    let run = bench.run("--log-format json tokenize photos -o out --model model").exits(3);
    let events: Vec<Value> = run.stderr.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let skipped = events.iter().find(|event| event["event"] == "skipped").expect("an event");
    assert_eq!(skipped["path"], "photos/bad.jpg");
    assert!(events.iter().any(|event| event["event"] == "shard" && event["rows"] == 5));
    let run = bench.run("tokenize nowhere -o out2 --model model --log-format json").exits(1);
    assert_eq!(serde_json::from_str::<Value>(run.stderr.trim()).expect("JSON")["event"], "error");
}

/// Kills workers at random points, twenty times for each number of ranks, and compares with a run that was left alone.
#[cfg(unix)]
#[test]
fn chaos_ends_in_the_bytes_of_an_undisturbed_run() {
    use std::time::Duration;

    const KILLS: usize = 20;
    let bench = Bench::new();
    bench.make_tars(40);
    let line =
        "tokenize tars -o OUT --model model --input-format webdataset --image-size 128 --batch-size 2 --reconstruct";
    let line = |out: &str| line.replace("OUT", out);
    bench.run(&line("whole")).exits(3);
    let expected = bytes_of(&bench, "whole");
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    for n in [1usize, 3] {
        let out = format!("n{n}");
        let start = |i: usize| {
            let mut command = bench.command(&format!("{} --shard-index {i} --num-shards {n}", line(&out)));
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary")
        };
        let (mut kills, mut resumed) = (0, 0);
        while kills < KILLS {
            let mut workers: Vec<_> = (0..n).map(start).collect();
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            std::thread::sleep(Duration::from_millis(30 + random % 150));
            let alive: Vec<usize> = (0..n).filter(|&i| workers[i].try_wait().expect("a worker").is_none()).collect();
            if alive.is_empty() {
                // Done too soon: one shard is taken away, so that there is something to disturb.
                std::fs::remove_file(bench.path(&format!("{out}/00001_stats.json"))).expect("statistics");
                continue;
            }
            let victim = alive[(random >> 33) as usize % alive.len()];
            workers[victim].kill().expect("kill");
            kills += 1;
            // The others are let go on every other time, and killed too in between.
            for (i, worker) in workers.iter_mut().enumerate() {
                if kills % 2 == 0 && i != victim {
                    let _ = worker.kill();
                }
                let _ = worker.wait();
            }
            resumed += usize::from(bench.path(&format!("{out}/.00001.part")).exists());
        }
        for i in 0..n {
            let code = bench.run(&format!("{} --shard-index {i} --num-shards {n}", line(&out))).code;
            assert!(matches!(code, Some(0 | 3)), "{code:?}");
        }
        bench.run(&line(&out));
        let found = bytes_of(&bench, &out);
        let differing: Vec<_> = expected.iter().filter(|(path, bytes)| found.get(*path) != Some(*bytes)).collect();
        let names: Vec<_> = differing.iter().map(|(path, _)| path.display().to_string()).collect();
        let more: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).collect();
        assert!(
            names.is_empty() && more.is_empty(),
            "{n} workers, {resumed} half-done: {names:?} differ, {more:?} are new"
        );
    }
}

#[test]
fn two_processes_at_the_same_shards_write_the_same_bytes() {
    let bench = Bench::with_photos(40);
    let line = "tokenize photos --model model --samples-per-shard 20 --reconstruct -o";
    bench.run(&format!("{line} whole")).exits(0);
    let start = || bench.command(&format!("{line} out")).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let workers: Vec<_> = (0..3).map(|_| start()).collect();
    for worker in workers {
        let output = worker.wait_with_output().expect("the end");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(bytes_of(&bench, "out") == bytes_of(&bench, "whole"));
}

/// SIGTERM ends a run at the edge of a batch: what is in the journal is whole, and the next run goes on behind it.
#[cfg(unix)]
#[test]
fn sigterm_stops_at_the_edge_of_a_batch() {
    use std::process::Command;

    let bench = Bench::with_photos(120);
    let line = "tokenize photos --model model --image-size 192 --batch-size 2 -o";
    bench.run(&format!("{line} whole")).exits(0);
    let mut child =
        bench.command(&format!("{line} out")).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let journal = bench.path("out/.00000.part");
    while std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count()) < 7 {
        assert!(child.try_wait().expect("a child").is_none(), "the run ended before it could be stopped");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().expect("the end");
    assert_eq!(output.status.code(), Some(130));
    let text = std::fs::read_to_string(&journal).expect("the journal");
    // A run that paints too does not go on from one that did not: the pictures of the first rows would be missing.
    let painted = bench.path("painted");
    std::fs::create_dir_all(&painted).expect("a folder");
    std::fs::copy(&journal, painted.join(".00000.part")).expect("a copy");
    assert_eq!(bench.run(&format!("{line} painted --reconstruct")).exits(0).summary()["images"], 120);
    assert!(text.ends_with('\n') && text.lines().count() % 2 == 1, "one line and whole batches of two");
    let summary = bench.run(&format!("{line} out")).exits(0).says(&["images were done before"]).summary();
    assert_eq!(summary["resumed"].as_u64(), Some(text.lines().count() as u64 - 1));
    assert!(bytes_of(&bench, "out") == bytes_of(&bench, "whole"));
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let bench = Bench::with_photos(3);
    let mut command = std::process::Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f 1; exec '{BINARY}' tokenize photos -o out --model model");
    command.args(["-c", &script]).current_dir(bench.folder.path()).env("VQRAE_DEVICE", "cpu");
    super::finish(command).exits(1).says(&["error: out/", "File too large"]);
    assert!(!bench.path("out/00000_stats.json").exists() && !bench.path("out/00000.parquet").exists());
    bench.run("tokenize photos -o out --model model").exits(0);
    bench.run("tokenize photos -o whole --model model").exits(0);
    assert!(bytes_of(&bench, "out") == bytes_of(&bench, "whole"));
}

/// Files that PyPI `datasets` and pyarrow wrote: tests/fixtures/table/make.py.
#[test]
fn parquet_files_of_images_become_shards_with_labels_and_captions() {
    let bench = Bench::new();
    let table = |name: &str| {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/table").join(name);
        std::fs::read(path).expect(name)
    };
    bench.write("hf/datasets.parquet", &table("datasets.parquet"));
    bench.write("hf/plain.parquet", &table("plain.parquet"));
    let line = "tokenize hf/datasets.parquet hf/plain.parquet --model model -o";
    bench.run(&format!("{line} out --batch-size 3 --num-workers 5")).exits(3);
    let rows = rows(&bench, "out");
    assert_eq!(rows.len(), 24);
    let row = &rows[7];
    assert_eq!((row.key.as_str(), row.path.as_str()), ("datasets-0007", "datasets.parquet/7"));
    let facts = (row.label, row.class.as_deref(), row.caption.as_deref());
    assert_eq!(facts, (Some(1), Some("cat"), Some("picture 7")));
    assert_eq!((row.width, row.height), (Some(12), Some(9)));
    let errors: Vec<_> = rows.iter().filter_map(|row| Some((row.key.as_str(), row.error.as_deref()?))).collect();
    assert_eq!(errors.len(), 2);
    assert_eq!(errors[0], ("datasets-0005", "no bytes in the column `image`"));
    assert!(errors[1].0 == "datasets-0008" && errors[1].1.starts_with("not a JPEG"), "{errors:?}");
    assert_eq!(rows[20..].iter().map(|row| row.label).collect::<Vec<_>>(), [Some(3), Some(1), None, Some(2)]);
    // The same pictures as files of their own have the same codes, and a run that starts in the middle goes on rightly.
    assert_eq!(rows[20].codes, rows[0].codes);
    bench.run(&format!("{line} again --batch-size 2 --num-workers 1")).exits(3);
    assert!(bytes_of(&bench, "again") == bytes_of(&bench, "out"));
    let told = bench.run("verify out --images hf/datasets.parquet hf/plain.parquet --model model").exits(0);
    assert_eq!(serde_json::from_str::<Value>(&told.stdout).unwrap()["encoded_again"], 24);
    bench.run("tokenize hf/plain.parquet -o no --model model --image-key picture").exits(3).says(&["it has jpg, cls"]);
    // Damaged at any place: rows with errors, never the end of the run.
    let whole = table("datasets.parquet");
    for (i, at) in (0..whole.len()).step_by(whole.len() / 12).enumerate() {
        let mut damaged = whole.clone();
        damaged[at..].iter_mut().take(40).for_each(|byte| *byte = byte.wrapping_mul(31).wrapping_add(77));
        bench.write(&format!("damaged/{i}.parquet"), &damaged);
        bench.write(&format!("damaged/cut{i}.parquet"), &whole[..at]);
    }
    let run = bench.run("tokenize damaged -o hurt --model model --input-format parquet");
    assert!(matches!(run.code, Some(0 | 3)), "{}", run.stderr);
    bench.run("verify hurt").exits(0);
}
