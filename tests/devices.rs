//! Several devices, played by the CPU, and the words for those that are not there.

use super::*;

#[test]
fn several_devices_write_the_files_of_one() {
    let bench = Bench::with_photos(23);
    // In between, so that batches of the devices do not fall on the same places of the folder.
    bench.write("photos/0010-broken.png", b"no image");
    let line =
        "tokenize --output-format safetensors photos --model model --batch-size 3 --reconstruct --resolution 32,64x32";
    bench.run(&format!("{line} -o one --device cpu")).exits(3);
    let expected = bench.tree("one");
    assert_eq!(expected.len(), 23 * 2 * 2 + 2);
    for devices in ["cpu,cpu", "cpu,cpu,cpu"] {
        let summary = bench.run(&format!("{line} -o {devices} --device {devices}")).exits(3).summary();
        assert_eq!((summary["images"].as_u64(), summary["device"].as_str()), (Some(23), Some(devices)));
        assert!(bench.tree(devices) == expected, "{devices} writes other files than cpu");
    }
}

#[test]
fn what_one_device_left_undone_is_done_by_several() {
    let bench = Bench::with_photos(9);
    bench.run("tokenize --output-format safetensors photos -o whole --model model").exits(0);
    bench.run("tokenize --output-format safetensors photos -o out --model model").exits(0);
    for name in ["0000.png", "cats/0004.png", "cats/tom/0005.jpg", "cats/tom/0008.png"] {
        std::fs::remove_file(bench.path(&format!("out/codes/{name}.safetensors"))).expect(name);
    }
    let run = bench
        .run("tokenize --output-format safetensors photos -o out --model model --batch-size 1 --device cpu,cpu,cpu")
        .exits(0);
    assert_eq!((run.summary()["images"].as_u64(), run.summary()["resumed"].as_u64()), (Some(4), Some(5)));
    assert!(bench.tree("out") == bench.tree("whole"));
}

#[test]
fn a_device_that_is_not_there_is_an_error_with_a_next_step() {
    let bench = Bench::with_photos(1);
    let run = bench.run("tokenize --output-format safetensors photos -o out --model model --device cuda");
    // Where there is a GPU, it is used.
    if run.code == Some(0) {
        assert_eq!(run.summary()["device"], "cuda:0");
    } else {
        let run = run.exits(1).says(&["error: cuda:0 cannot be used: "]);
        assert!(cfg!(feature = "cuda") || run.stderr.contains("--features cuda"), "{}", run.stderr);
        bench.run("train --config none.toml --data photos -o run --device cuda:0,1").exits(1);
        bench.run("bench --shapes tiny --device cuda:0").exits(1).says(&["cuda:0 cannot be used: "]);
    }
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --device cuda:64")
        .exits(1)
        .says(&["cuda:64 cannot be used: "]);
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --device gpu")
        .exits(2)
        .says(&["expected: auto, cpu, cuda"]);
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --device cuda:0,0")
        .exits(2)
        .says(&["card 0 is named twice"]);
}

#[test]
fn auto_takes_what_there_is_and_the_summary_says_what() {
    let bench = Bench::with_photos(2);
    let device = |command: Command| finish(command).exits(0).summary()["device"].as_str().map(str::to_string);
    let line = "tokenize --output-format safetensors photos --model model -o";
    assert_eq!(device(bench.command(&format!("{line} a"))).as_deref(), Some("cpu"));
    let auto = device(bench.command(&format!("{line} b --device auto"))).expect("a device");
    assert!(auto == "cpu" || cfg!(feature = "cuda") && auto == "cuda:0", "{auto}");
    let mut command = bench.command(&format!("{line} c"));
    command.env("VQRAE_DEVICE", "cpu,cpu");
    assert_eq!(device(command).as_deref(), Some("cpu,cpu"));
}

#[test]
fn commands_of_one_device_refuse_several() {
    let bench = Bench::with_photos(1);
    for line in ["features photos -o out", "reconstruct photos -o out", "codebook -o out"] {
        bench
            .run(&format!("{line} --model model --device cpu,cpu"))
            .exits(1)
            .says(&["cpu,cpu names several devices", "computes on one"]);
    }
}

/// A run on cards, of which a played GPU (kernels/cuda/cpu) has as many as are asked for; `None` where they are not there.
fn on_cards(bench: &Bench, line: &str, memory: Option<usize>) -> Option<Run> {
    let mut command = bench.command(line);
    command.env("VQRAE_GPU_COUNT", "3").envs(memory.map(|bytes| ("VQRAE_GPU_MEMORY", bytes.to_string())));
    let run = finish(command);
    (!run.stderr.contains("cannot be used")).then_some(run)
}

#[test]
fn several_cards_write_the_files_of_one() {
    let bench = Bench::with_photos(13);
    bench.write("photos/0005-broken.png", b"no image");
    let line = "tokenize --output-format safetensors photos --model model --batch-size 2 --reconstruct";
    let Some(one) = on_cards(&bench, &format!("{line} -o one --device cuda:0"), None) else { return };
    assert_eq!(one.exits(3).summary()["device"], "cuda:0");
    for cards in ["cuda:2,0", "cuda:0,1,2"] {
        // A machine may have one card alone.
        let Some(run) = on_cards(&bench, &format!("{line} -o {cards} --device {cards}"), None) else { return };
        assert_eq!(run.exits(3).summary()["device"], *cards);
        assert!(bench.tree(cards) == bench.tree("one"), "{cards} write other files than cuda:0");
    }
}

#[test]
fn a_batch_that_is_too_large_for_a_card_names_one_that_is_not() {
    /// cuBLASLt has 32 MiB of it.
    const MEMORY: usize = 80_000_000;
    let bench = Bench::with_photos(3);
    for command in ["tokenize", "features", "reconstruct"] {
        let line = |size: &str| {
            format!("{command} photos -o {command}-{size} --model model --device cuda --batch-size {size}")
        };
        // A GPU that is not played does not know of the limit, and holds the batch.
        let Some(run) = on_cards(&bench, &line("4096"), Some(MEMORY)).filter(|run| run.code != Some(0)) else { return };
        let run = run.exits(1).says(&["a batch of 4096 images does not fit in the memory of cuda:0 (76 MiB)"]);
        let fits = run.stderr.split("pass --batch-size ").nth(1).and_then(|rest| rest.split_whitespace().next());
        let fits = fits.unwrap_or_else(|| panic!("no size in: {}", run.stderr));
        on_cards(&bench, &line(fits), Some(MEMORY)).expect("the card of before").exits(0);
    }
}
