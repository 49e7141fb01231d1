//! Models of a hub: the binary against a server on loopback that answers as huggingface.co does.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use tempfile::TempDir;
use vqrae::Config;
use vqrae::codes::Codes;
use vqrae::image::{Preprocessor, Resample, Rgb, save_png};
use vqrae::model::{fresh_tensors, save};
use vqrae::weights::{self, Tensors};

const BINARY: &str = env!("CARGO_BIN_EXE_vqrae-cli");
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SIDE: usize = 32;
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What the server has, how it misbehaves, and what it was asked.
#[derive(Default)]
struct State {
    /// By repository, then by path; revision `main` and its commit.
    repositories: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Without this token every answer is 401.
    token: Option<String>,
    /// How many of the next answers with tensors, of more than one byte, are cut half-way.
    cuts: usize,
    /// Lines such as `GET /a/b/resolve/main/config.json 0-0`.
    log: Vec<String>,
    /// Bytes that the server says a file has beyond those that it sends.
    boast: usize,
    /// Whether answers come without their length.
    without_length: bool,
    /// How many of the next answers are 503.
    busy: usize,
}

struct Hub {
    url: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                // A program that hangs up early is no failure of the server.
                std::thread::spawn(move || answer(stream, &state));
            }
        });
        Self { url, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the state")
    }

    /// Serves the files of a folder.
    fn publish(&self, repository: &str, folder: &Path) {
        let mut files = BTreeMap::new();
        for entry in folder.read_dir().expect("a folder") {
            let entry = entry.expect("an entry");
            files.insert(entry.file_name().to_string_lossy().to_string(), std::fs::read(entry.path()).expect("a file"));
        }
        self.state().repositories.insert(repository.to_string(), files);
    }

    fn change(&self, repository: &str, change: impl FnOnce(&mut BTreeMap<String, Vec<u8>>)) {
        change(self.state().repositories.get_mut(repository).expect("a repository"));
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state().log)
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut lines = std::iter::from_fn(|| {
        let mut line = String::new();
        let read = reader.read_line(&mut line).ok()?;
        (read > 2).then(|| line.trim_end().to_string())
    });
    let first = lines.next()?;
    let headers: BTreeMap<String, String> =
        lines.filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_lowercase(), v.to_string()))).collect();
    let path = first.split(' ').nth(1)?.trim_start_matches('/').to_string();
    let range = headers.get("range").and_then(|range| range.strip_prefix("bytes=")).map(str::to_string);
    let mut state = state.lock().ok()?;
    state.log.push(format!("{path} {}", range.as_deref().unwrap_or("all")));

    let reply = |stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\n{headers}connection: close\r\n\r\n").ok()?;
        stream.write_all(body).ok()?;
        stream.flush().ok()?;
        stream.shutdown(Shutdown::Write).ok()?;
        // Until the other side has read all of it.
        std::io::copy(&mut stream.take(1 << 16), &mut std::io::sink()).ok()?;
        Some(())
    };
    let refuse = |stream: &mut TcpStream, status: &str| reply(stream, status, "content-length: 0\r\n", b"");
    if state.busy > 0 {
        state.busy -= 1;
        return refuse(&mut stream, "503 Service Unavailable");
    }
    if state.token.is_some()
        && headers.get("authorization") != state.token.as_ref().map(|t| format!("Bearer {t}")).as_ref()
    {
        return refuse(&mut stream, "401 Unauthorized");
    }
    let parts: Vec<&str> = path.splitn(5, '/').collect();
    let known = |revision: &str| revision == "main" || revision == COMMIT;
    if let ["api", "models", owner, name, rest] = parts[..] {
        let files = state.repositories.get(&format!("{owner}/{name}"));
        let Some(files) = files.filter(|_| rest.strip_prefix("revision/").is_some_and(known)) else {
            return refuse(&mut stream, "404 Not Found");
        };
        let siblings: Vec<Value> = files.keys().map(|file| json!({ "rfilename": file })).collect();
        let body = json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        let headers = format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
        return reply(&mut stream, "200 OK", &headers, body.as_bytes());
    }
    let file = match parts[..] {
        [owner, name, "resolve", revision, file] if known(revision) => {
            state.repositories.get(&format!("{owner}/{name}")).and_then(|files| files.get(file)).cloned()
        }
        _ => None,
    };
    let Some(bytes) = file else { return refuse(&mut stream, "404 Not Found") };
    let (start, end) = range.as_deref().and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let start: usize = start.parse().ok()?;
    let end = end.parse().map_or(bytes.len(), |end: usize| end + 1).min(bytes.len());
    if start >= bytes.len() && !bytes.is_empty() {
        return refuse(&mut stream, "416 Range Not Satisfiable");
    }
    let body = &bytes[start..end];
    let mut headers = format!(
        "etag: \"{}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {start}-{}/{}\r\n",
        etag(&bytes),
        end.saturating_sub(1),
        bytes.len() + state.boast
    );
    if !state.without_length {
        headers += &format!("content-length: {}\r\n", body.len());
    }
    let cut = state.cuts > 0 && body.len() > 1 && path.ends_with(".safetensors");
    state.cuts -= usize::from(cut);
    drop(state);
    reply(&mut stream, "206 Partial Content", &headers, if cut { &body[..body.len() / 2] } else { body })
}

/// Any hash will do for an etag.
fn etag(bytes: &[u8]) -> String {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

/// A hub with the model `cats/tiny`, a folder with the same model in `model` and a photo, and a cache in `home`.
struct Bench {
    folder: TempDir,
    hub: Hub,
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

const TOKENIZE: &str = "tokenize --output-format safetensors photo.png -o out --dtype f32 --model cats/tiny";

impl Bench {
    fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().expect("a folder"), hub: Hub::start() };
        let config = json!({
            "model_type": "vqrae",
            "format": 1,
            "encoder": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": 8,
            },
            "quantizer": { "type": "simvq", "codebook_size": 64, "codebook_dim": 8 },
        });
        let config = Config::from_json(&config.to_string(), Path::new("config.json")).expect("a config");
        let tensors = fresh_tensors(&config, Tensors::new(), 1).expect("tensors");
        let preprocessor = Preprocessor::siglip(SIDE, Resample::Bicubic);
        save(&bench.path("model"), &config, &preprocessor, &tensors).expect("a model folder");
        let pixels = (0..SIDE * SIDE * 3).map(|i| (i * 7 % 251) as u8).collect();
        let photo = Rgb { width: SIDE, height: SIDE, data: pixels };
        save_png(&bench.path("photo.png"), &photo).expect("a photo");
        bench.hub.publish("cats/tiny", &bench.path("model"));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where the cache has a file of `cats/tiny`.
    fn cached(&self, file: &str) -> PathBuf {
        self.path("home/hub/models--cats--tiny/snapshots").join(COMMIT).join(file)
    }

    fn run(&self, line: &str) -> Run {
        self.run_with(line, &[])
    }

    fn run_with(&self, line: &str, variables: &[(&str, &str)]) -> Run {
        let mut command = Command::new(BINARY);
        command.env("VQRAE_DEVICE", "cpu");
        command.args(line.split_whitespace()).current_dir(self.folder.path()).stdin(Stdio::null());
        for name in
            ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "RUST_BACKTRACE", "http_proxy", "HTTP_PROXY", "ALL_PROXY"]
        {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.path("home")).env("HF_ENDPOINT", &self.hub.url).envs(variables.iter().copied());
        let output = command.output().expect("the binary");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let run = Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
        run
    }
}

impl Run {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "expected {part:?} in stderr: {}", self.stderr);
        }
        self
    }
}

#[test]
fn a_model_is_downloaded_once_and_then_taken_from_the_cache() {
    let bench = Bench::new();
    bench.run(TOKENIZE).exits(0).says(&["model.safetensors: ", " downloaded"]);
    assert_eq!(
        std::fs::read(bench.cached(WEIGHTS)).unwrap(),
        std::fs::read(bench.path("model").join(WEIGHTS)).unwrap()
    );
    let codes = |out: &str| Codes::read(bench.path(out).join("codes/photo.png.safetensors")).expect("codes");
    bench.run("tokenize --output-format safetensors photo.png -o local --dtype f32 --model model").exits(0);
    assert_eq!(codes("out"), codes("local"));
    assert!(!bench.hub.requests().is_empty());

    // From here on nothing is asked for, whatever the hub is up to.
    for (out, variables) in [
        ("cached", [("HF_ENDPOINT", "http://127.0.0.1:1"), ("HF_TOKEN", "")]),
        ("offline", [("HF_HUB_OFFLINE", "1"), ("HF_TOKEN", "")]),
        ("elsewhere", [("HF_HOME", "nowhere"), ("HF_HUB_CACHE", "home/hub")]),
    ] {
        let line =
            format!("tokenize --output-format safetensors photo.png -o {out} --dtype f32 --model cats/tiny@main");
        bench.run_with(&line, &variables).exits(0);
        assert_eq!(codes(out), codes("local"));
    }
    bench.run(&format!("{TOKENIZE}@{COMMIT}")).exits(0);
    assert_eq!(bench.hub.requests(), [""; 0]);
}

#[test]
fn a_folder_of_that_name_comes_first() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("cats")).unwrap();
    std::fs::rename(bench.path("model"), bench.path("cats/tiny")).unwrap();
    bench.run(TOKENIZE).exits(0);
    assert_eq!(bench.hub.requests(), [""; 0]);
    bench
        .run("tokenize --output-format safetensors photo.png -o out --model cats/tiny/deep")
        .exits(1)
        .says(&["no such folder", "OWNER/NAME"]);
}

#[test]
fn a_cut_connection_goes_on_where_it_stopped() {
    let bench = Bench::new();
    let whole = std::fs::read(bench.path("model").join(WEIGHTS)).unwrap();
    // Each time half of the rest comes, within one run.
    bench.hub.state().cuts = 3;
    bench.run(TOKENIZE).exits(0).says(&["trying again"]);
    assert_eq!(std::fs::read(bench.cached(WEIGHTS)).unwrap(), whole);

    // So many that the run gives up; the next one goes on.
    std::fs::remove_file(bench.cached(WEIGHTS)).unwrap();
    bench.hub.state().cuts = 4;
    bench.run(TOKENIZE).exits(1).says(&["model.safetensors of cats/tiny@main", "goes on where it stopped"]);
    bench.hub.requests();
    bench.run(TOKENIZE).exits(0);
    let requests = bench.hub.requests();
    let start = requests.iter().filter_map(|line| line.strip_suffix('-')?.rsplit(' ').next()?.parse::<usize>().ok());
    assert!(start.min().is_some_and(|start| start > whole.len() * 9 / 10), "{requests:?}");
    assert_eq!(std::fs::read(bench.cached(WEIGHTS)).unwrap(), whole);
}

#[test]
fn a_part_that_lacks_nothing_or_has_too_much_is_put_right() {
    let bench = Bench::new();
    let whole = std::fs::read(bench.path("model").join(WEIGHTS)).unwrap();
    bench.run(TOKENIZE).exits(0);
    for part in [whole.clone(), [&whole[..], b"more"].concat()] {
        let blob = bench.cached(WEIGHTS).canonicalize().unwrap();
        std::fs::remove_file(&blob).unwrap();
        std::fs::write(blob.with_extension("part"), part).unwrap();
        bench.run(TOKENIZE).exits(0);
        assert_eq!(std::fs::read(bench.cached(WEIGHTS)).unwrap(), whole);
    }
}

#[test]
fn an_answer_without_a_length_that_ends_early_is_noticed() {
    let bench = Bench::new();
    bench.hub.state().without_length = true;
    bench.hub.state().cuts = 3;
    bench.run(TOKENIZE).exits(0);
    assert_eq!(
        std::fs::read(bench.cached(WEIGHTS)).unwrap(),
        std::fs::read(bench.path("model").join(WEIGHTS)).unwrap()
    );
}

#[test]
fn a_busy_server_is_asked_again() {
    let bench = Bench::new();
    bench.hub.state().busy = 2;
    bench.run(TOKENIZE).exits(0).says(&["503", "trying again"]);
}

#[test]
fn a_wrong_length_is_refused() {
    let bench = Bench::new();
    bench.hub.state().boast = 5;
    let run = bench.run(TOKENIZE).exits(1);
    run.says(&["config.json", "run the same command again"]);
    assert!(!bench.cached("config.json").exists());
}

#[test]
fn a_broken_file_is_refused_by_path_until_it_is_deleted() {
    let bench = Bench::new();
    let good = std::fs::read(bench.path("model").join(WEIGHTS)).unwrap();
    let mut longer_than_it_says = good.clone();
    longer_than_it_says.extend([0; 7]);
    for bad in [b"<html>sign in</html>".to_vec(), good[..good.len() - 9].to_vec(), longer_than_it_says, vec![0xff; 64]]
    {
        bench.hub.change("cats/tiny", |files| files.insert(WEIGHTS.to_string(), bad).map_or((), drop));
        let path = bench.cached(WEIGHTS).display().to_string();
        bench.run(TOKENIZE).exits(1).says(&[&path, "not a whole safetensors file", "delete this file and run"]);
        // It stays refused when it comes from the cache.
        bench.run_with(TOKENIZE, &[("HF_HUB_OFFLINE", "yes")]).exits(1).says(&[&path, "delete this file and run"]);
        bench.hub.change("cats/tiny", |files| files.insert(WEIGHTS.to_string(), good.clone()).map_or((), drop));
        std::fs::remove_file(&path).unwrap();
        bench.run(TOKENIZE).exits(0);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_the_hub_does_not_have_is_told_by_name() {
    let bench = Bench::new();
    let run = bench.run("tokenize --output-format safetensors photo.png -o out --model cats/large").exits(1);
    run.says(&["no folder cats/large here", "there is no cats/large@main", &bench.hub.url, "check the spelling"]);
    let run = bench.run("tokenize --output-format safetensors photo.png -o out --model cats/tiny@v2").exits(1);
    run.says(&["cats/tiny has no revision v2"]);
    bench.hub.change("cats/tiny", |files| files.remove("preprocessor_config.json").map_or((), drop));
    bench
        .run(TOKENIZE)
        .exits(1)
        .says(&["cats/tiny@main has no preprocessor_config.json", "config.json, model.safetensors"]);
    bench.hub.publish("cats/torch", &bench.path("model"));
    bench.hub.change("cats/torch", |files| {
        let weights = files.remove(WEIGHTS).unwrap();
        files.insert("pytorch_model.bin".to_string(), weights);
    });
    let run = bench.run("tokenize --output-format safetensors photo.png -o out --model cats/torch").exits(1);
    run.says(&["neither model.safetensors nor", "pytorch_model.bin", "convert"]);
    let closed = [("HF_ENDPOINT", "http://127.0.0.1:1")];
    bench
        .run_with("tokenize --output-format safetensors photo.png -o out --model a/b", &closed)
        .exits(1)
        .says(&["http://127.0.0.1:1", "check the network"]);
}

#[test]
fn a_private_model_wants_a_token() {
    let bench = Bench::new();
    bench.hub.state().token = Some("hf_secret".to_string());
    bench.run(TOKENIZE).exits(1).says(&["401", "set HF_TOKEN"]);
    let run = bench.run_with(TOKENIZE, &[("HF_TOKEN", "hf_other")]).exits(1).says(&["401", "may not read it"]);
    assert!(!run.stderr.contains("hf_other"), "{}", run.stderr);
    bench.run_with(TOKENIZE, &[("HF_TOKEN", "hf_secret")]).exits(0);

    // Where Python's login leaves it.
    std::fs::remove_dir_all(bench.path("home")).unwrap();
    std::fs::create_dir(bench.path("home")).unwrap();
    std::fs::write(bench.path("home/token"), "hf_secret\n").unwrap();
    bench.run(TOKENIZE).exits(0);
}

#[test]
fn offline_means_no_request() {
    let bench = Bench::new();
    let offline = [("HF_HUB_OFFLINE", "1")];
    bench.run_with(TOKENIZE, &offline).exits(1).says(&["no folder cats/tiny here", "home/hub", "HF_HUB_OFFLINE"]);
    bench.run(TOKENIZE).exits(0);
    std::fs::remove_file(bench.cached("preprocessor_config.json")).unwrap();
    bench.hub.requests();
    bench.run_with(TOKENIZE, &offline).exits(1).says(&["preprocessor_config.json of it is missing", "HF_HUB_OFFLINE"]);
    assert_eq!(bench.hub.requests(), [""; 0]);
}

/// Splits a folder's tensors into two files and their index.
fn split(folder: &Path) {
    let tensors = weights::read(folder).expect("tensors");
    let mut map = serde_json::Map::new();
    let names: Vec<_> = tensors.keys().cloned().collect();
    for (i, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", i + 1);
        let part: Tensors = names.iter().map(|name| (name.clone(), tensors[name].clone())).collect();
        weights::write(&folder.join(&file), &part, Default::default()).expect("a shard");
        map.extend(names.iter().map(|name| (name.clone(), json!(file))));
    }
    std::fs::write(folder.join(INDEX), json!({ "weight_map": map }).to_string()).expect("an index");
    std::fs::remove_file(folder.join(WEIGHTS)).expect("the whole file");
}

#[test]
fn shards_are_downloaded_as_the_index_lists_them() {
    let bench = Bench::new();
    split(&bench.path("model"));
    bench.hub.publish("cats/tiny", &bench.path("model"));
    bench.hub.state().cuts = 3;
    bench.run(TOKENIZE).exits(0).says(&["model-00002-of-00002.safetensors: "]);
    bench.run_with(TOKENIZE, &[("HF_HUB_OFFLINE", "1")]).exits(0);

    let shard = bench.cached("model-00001-of-00002.safetensors");
    std::fs::remove_file(&shard).unwrap();
    let run = bench.run_with(TOKENIZE, &[("HF_HUB_OFFLINE", "1")]).exits(1);
    run.says(&["model-00001-of-00002.safetensors of it is missing"]);
    bench.hub.change("cats/tiny", |files| files.remove("model-00001-of-00002.safetensors").map_or((), drop));
    bench.run(TOKENIZE).exits(1).says(&["cats/tiny@main has no model-00001-of-00002.safetensors"]);

    let outside = json!({ "weight_map": { "x": "../../secret.safetensors" } }).to_string();
    bench.hub.change("cats/tiny", |files| files.insert(INDEX.to_string(), outside.into_bytes()).map_or((), drop));
    std::fs::remove_dir_all(bench.path("home")).unwrap();
    bench.run(TOKENIZE).exits(1).says(&["is not a file of this folder"]);
}

#[test]
fn init_takes_an_encoder_of_the_hub() {
    let bench = Bench::new();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/siglip/tiny");
    bench.hub.publish("dogs/siglip", &tiny);
    let wishes = json!({ "quantizer": { "type": "simvq", "codebook_size": 16, "codebook_dim": 8 } });
    std::fs::write(bench.path("wishes.json"), wishes.to_string()).unwrap();
    let remote = bench.run("init --encoder dogs/siglip --config wishes.json -o a").exits(0);
    let local = bench.run(&format!("init --encoder {} --config wishes.json -o b", tiny.display())).exits(0);
    let id = |run: &Run| run.stdout.lines().find(|line| line.starts_with("id ")).map(str::to_string);
    assert_eq!(id(&remote), id(&local));
    assert!(id(&remote).is_some());
}

#[test]
fn the_cache_is_listed() {
    let bench = Bench::new();
    bench.run("cache list").exits(0).says(&["no models in", "home/hub"]);
    bench.run(TOKENIZE).exits(0);
    bench.hub.change("cats/tiny", |files| files.remove(WEIGHTS).map_or((), drop));
    bench.hub.publish("dogs/half", &bench.path("model"));
    bench.hub.change("dogs/half", |files| files.remove(WEIGHTS).map_or((), drop));
    bench.run("tokenize --output-format safetensors photo.png -o out --model dogs/half").exits(1);
    let listed = bench.run("cache list").exits(0).stdout;
    let lines: Vec<_> = listed.lines().collect();
    assert!(lines[0].starts_with("cats/tiny@main") && lines[0].contains("  whole  "), "{listed}");
    assert!(lines[1].starts_with("dogs/half@main") && lines[1].contains("lacks model.safetensors"), "{listed}");
    let json: Value = serde_json::from_str(&bench.run("cache list --json").exits(0).stdout).expect("JSON");
    assert_eq!(json[0]["repository"], "cats/tiny");
    assert_eq!((&json[0]["commit"], &json[0]["model_type"]), (&COMMIT.into(), &"vqrae".into()));
    assert_eq!(json[0]["revisions"], json!(["main"]));
    let size = |file: &str| bench.cached(file).metadata().unwrap().len();
    assert_eq!(json[0]["bytes"], size(WEIGHTS) + size("config.json") + size("preprocessor_config.json"));
    assert_eq!(json[1]["missing"], json!([WEIGHTS]));
}
