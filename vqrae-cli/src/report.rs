//! What a run says: progress and skipped files on stderr, data on stdout, an exit code at the end. All printing is
//! here.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::ValueEnum;
#[cfg(feature = "hub")]
use indicatif::HumanBytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};
use vqrae::Error;
use vqrae::codes::shard::Stats;

use crate::inputs::Input;

/// How a run ended; the later, the graver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Exit {
    Success,
    /// Everything was done, but for files that could not be read.
    Skipped,
    Failure,
    /// Ctrl-C or SIGTERM.
    Interrupted,
}

impl Exit {
    /// The exit of a run of two parts.
    pub(crate) fn merge(self, other: Self) -> Self {
        self.max(other)
    }

    /// 2 is clap's, for words that make no sense.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Skipped => 3,
            Self::Interrupted => 130,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Data, for stdout. A reader that has gone away is no error.
pub(crate) fn data(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}

/// How talk is written.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line, for machines
    Json,
}

static JSON: AtomicBool = AtomicBool::new(false);

/// From here on talk is written like this.
pub(crate) fn set_format(format: LogFormat) {
    JSON.store(format == LogFormat::Json, Ordering::Relaxed);
}

/// Talk, for stderr.
pub(crate) fn say(text: &str) {
    event("note", text, json!({}));
}

/// What happens, for stderr: the `text` for people, for machines an object with the fields of `facts` too.
fn event(name: &str, text: &str, facts: Value) {
    let line = match (JSON.load(Ordering::Relaxed), facts) {
        (true, Value::Object(mut fields)) => {
            fields.insert("event".to_string(), name.into());
            fields.insert("message".to_string(), text.into());
            Value::Object(fields).to_string()
        }
        _ => text.to_string(),
    };
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Facts for people: one a line, nested ones by their dotted name.
pub(crate) fn table(facts: &Value) -> String {
    let mut lines = Vec::new();
    flatten("", facts, &mut lines);
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let lines: Vec<_> = lines.into_iter().map(|(name, value)| format!("{name:width$}  {value}")).collect();
    lines.join("\n")
}

fn flatten(name: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (field, value) in fields {
                let dot = if name.is_empty() { "" } else { "." };
                flatten(&format!("{name}{dot}{field}"), value, lines);
            }
        }
        Value::Array(items) => {
            // Numbers are sizes, words a list.
            let between = if items.iter().all(Value::is_number) { " x " } else { ", " };
            let items: Vec<_> = items.iter().map(plain).collect();
            lines.push((name.to_string(), items.join(between)));
        }
        other => lines.push((name.to_string(), plain(other))),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Why a command failed, each cause once.
pub(crate) fn failure(error: &anyhow::Error) {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // An error of the library says its cause itself.
        if !message.contains(&cause) {
            message += if message.is_empty() { "" } else { ": " };
            message += &cause;
        }
    }
    event("error", &format!("error: {message}"), json!({ "reason": message }));
}

/// The last line on stdout of a run over files.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    /// Files done in this run.
    images: usize,
    /// Files that could not be read.
    skipped: usize,
    /// Files that an earlier run had done.
    resumed: usize,
    seconds: f64,
    images_per_second: f64,
    /// How much of the time the devices were computing: the rest, they waited for images or for the disk.
    busy: f64,
    /// Where: `cpu`, `cuda:0`, `cuda:0,1`.
    device: String,
    /// Of the shards of this process, those that are finished.
    #[serde(skip_serializing_if = "Option::is_none")]
    shards: Option<ShardCount>,
    #[serde(flatten)]
    quality: Quality,
}

/// How far the shards of a process are.
#[derive(Debug, Serialize)]
struct ShardCount {
    finished: usize,
    of: usize,
}

/// How good reconstructions are, where there is something to compare them with.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Quality {
    /// Mean over the images, in dB.
    #[serde(skip_serializing_if = "Option::is_none")]
    psnr: Option<f64>,
    /// The same at each of several resolutions.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    psnr_by_resolution: BTreeMap<String, f64>,
}

impl Quality {
    /// Of the PSNR of every image and the resolution, if there are several.
    pub(crate) fn of(images: &[(Option<(usize, usize)>, f64)]) -> Self {
        let round = |value: f64| (value * 1e3).round() / 1e3;
        let mean = |psnr: &[f64]| round(psnr.iter().sum::<f64>() / psnr.len() as f64);
        let all: Vec<f64> = images.iter().map(|(_, psnr)| *psnr).collect();
        let mut by_resolution: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for (mark, psnr) in images {
            if let Some((h, w)) = mark {
                by_resolution.entry(format!("{h}x{w}")).or_default().push(*psnr);
            }
        }
        Self {
            psnr: (!all.is_empty()).then(|| mean(&all)),
            psnr_by_resolution: by_resolution.into_iter().map(|(name, psnr)| (name, mean(&psnr))).collect(),
        }
    }
}

/// Counts what is done and tells about it.
pub(crate) struct Progress {
    bar: ProgressBar,
    total: usize,
    done: usize,
    skipped: usize,
    resumed: usize,
    max_errors: usize,
    computed: Duration,
    /// Finished, and in all.
    shards: Option<(usize, usize)>,
    errors: ErrorLog,
    started: Instant,
    last_line: Instant,
}

/// Between two lines of progress where there is no terminal to draw on.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// For `total` files, of which an earlier run did `resumed`; unreadable files go to the file `errors`, if there is one.
    pub(crate) fn new(total: usize, resumed: usize, max_errors: usize, errors: Option<PathBuf>) -> Result<Self> {
        let drawn = std::io::stderr().is_terminal() && !JSON.load(Ordering::Relaxed);
        let bar = if drawn { ProgressBar::new(total as u64) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} images, {per_sec}, {eta} left") {
            bar.set_style(style);
        }
        bar.set_position(resumed as u64);
        bar.reset_eta();
        let (errors, now) = (ErrorLog::start(errors)?, Instant::now());
        let progress = Self {
            bar,
            total,
            done: 0,
            skipped: 0,
            resumed,
            max_errors,
            computed: Duration::ZERO,
            shards: None,
            errors,
            started: now,
            last_line: now,
        };
        if resumed > 0 {
            progress.note(&format!("{resumed} of {total} images were done before, {} to go", total - resumed));
        }
        Ok(progress)
    }

    /// Counts files as done.
    pub(crate) fn advance(&mut self, count: usize) {
        self.done += count;
        self.bar.inc(count as u64);
        if self.bar.is_hidden() && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let (finished, rate) = (self.done + self.skipped + self.resumed, self.rate());
            let left = (self.total.saturating_sub(finished)) as f64 / rate.max(1e-9);
            let text = format!("{finished}/{} images, {rate:.1} images/s, about {left:.0} s left", self.total);
            let facts =
                json!({ "done": finished, "total": self.total, "images_per_second": rate, "seconds_left": left });
            self.tell("progress", &text, facts);
        }
    }

    /// Reports a file that could not be read, and gives up when there are too many of them.
    pub(crate) fn skip(&mut self, input: &Input, message: &str) -> Result<()> {
        let path = input.path.display().to_string();
        // The library's messages start with the path, which is said here anyway.
        let reason = message.strip_prefix(&path).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(message);
        let facts = json!({ "path": path, "reason": reason });
        self.tell("skipped", &format!("skipped {path}: {reason}"), facts);
        self.errors.add(&input.source(), reason)?;
        self.skipped += 1;
        self.bar.inc(1);
        if self.skipped > self.max_errors {
            bail!(
                "giving up: {} could not be read, allowed: {}{}",
                files(self.skipped),
                self.max_errors,
                self.errors.see()
            );
        }
        Ok(())
    }

    /// Talk, above the bar if there is one.
    pub(crate) fn note(&self, text: &str) {
        self.tell("note", text, json!({}));
    }

    /// What happens, with facts for machines.
    fn tell(&self, name: &str, text: &str, facts: Value) {
        self.bar.suspend(|| event(name, text, facts));
    }

    /// A device computed so long, a share of that where there are several.
    pub(crate) fn computed(&mut self, time: Duration) {
        self.computed += time;
    }

    /// How many could not be read.
    pub(crate) fn skipped(&self) -> usize {
        self.skipped
    }

    /// How many files there are, now that more is known.
    pub(crate) fn expect(&mut self, total: usize) {
        self.total = total;
        self.bar.set_length(total as u64);
    }

    /// Counts files that an earlier run had done.
    pub(crate) fn resume(&mut self, count: usize) {
        self.resumed += count;
        self.bar.inc(count as u64);
        self.bar.reset_eta();
    }

    /// A shard is done.
    pub(crate) fn shard(&mut self, stats: &Stats) {
        if let Some((finished, _)) = &mut self.shards {
            *finished += 1;
        }
        let (name, rows, errors) = (&stats.shard, stats.rows, stats.errors);
        let text = format!(
            "{name}: {rows} rows{}",
            if errors > 0 { format!(", {errors} without codes") } else { String::new() }
        );
        if JSON.load(Ordering::Relaxed) {
            self.tell("shard", &text, json!({ "shard": name, "rows": rows, "errors": errors, "bytes": stats.bytes }));
        }
    }

    /// Of so many shards, this many were done before.
    pub(crate) fn shards(&mut self, finished: usize, of: usize) {
        self.shards = Some((finished, of));
    }

    /// Says how to go on after Ctrl-C.
    pub(crate) fn interrupted(&self, next_step: &str) {
        let finished = self.done + self.skipped + self.resumed;
        self.note(&format!("interrupted: {finished} of {} files are done and whole; {next_step}", self.total));
    }

    /// The summary of a run on `device`, and how the run ended as far as skipped files go.
    pub(crate) fn finish(self, device: String, quality: Quality) -> (Summary, Exit) {
        self.bar.finish_and_clear();
        if self.skipped > 0 {
            say(&format!("{} could not be read{}", files(self.skipped), self.errors.see()));
        }
        let round = |value: f64| (value * 1e3).round() / 1e3;
        let summary = Summary {
            images: self.done,
            skipped: self.skipped,
            resumed: self.resumed,
            seconds: round(self.started.elapsed().as_secs_f64()),
            images_per_second: round(self.rate()),
            busy: round(self.computed.as_secs_f64() / self.started.elapsed().as_secs_f64().max(1e-9)),
            device,
            shards: self.shards.map(|(finished, of)| ShardCount { finished, of }),
            quality,
        };
        (summary, if self.skipped > 0 { Exit::Skipped } else { Exit::Success })
    }

    fn rate(&self) -> f64 {
        self.done as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }
}

/// Tells how a download gets on.
#[cfg(feature = "hub")]
pub(crate) struct Download {
    bar: ProgressBar,
    file: String,
    size: u64,
    done: u64,
    last_line: Instant,
}

#[cfg(feature = "hub")]
impl Download {
    /// Of a file of `size` bytes.
    pub(crate) fn new(file: &str, size: u64) -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new(size) } else { ProgressBar::hidden() };
        let template = "{msg} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(file.to_string());
        Self { bar, file: file.to_string(), size, done: 0, last_line: Instant::now() }
    }

    /// Counts bytes.
    pub(crate) fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        self.bar.inc(bytes);
        if self.bar.is_hidden() && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            say(&format!("{}: {} of {}", self.file, HumanBytes(self.done), HumanBytes(self.size)));
        }
    }

    /// All of it has come.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
        say(&format!("{}: {} downloaded", self.file, HumanBytes(self.size)));
    }
}

fn files(count: usize) -> String {
    if count == 1 { "1 file".to_string() } else { format!("{count} files") }
}

impl Summary {
    /// The line for stdout.
    pub(crate) fn line(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }
}

/// `OUT/errors.jsonl`, beside statistics `FILE.errors.jsonl`: one line for each file that this run could not read, written as it happens.
/// Shards have none: what could not be read stands in their own rows.
struct ErrorLog {
    path: Option<PathBuf>,
    file: Option<File>,
}

impl ErrorLog {
    /// Forgets the errors of an earlier run: their files are tried again.
    fn start(path: Option<PathBuf>) -> Result<Self> {
        if let Some(path) = &path
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(Error::io(path)(error).into());
        }
        Ok(Self { path, file: None })
    }

    /// Where to look.
    fn see(&self) -> String {
        match &self.path {
            Some(path) => format!("; see {}", path.display()),
            None => "; their rows say why".to_string(),
        }
    }

    fn add(&mut self, source: &str, reason: &str) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let line = format!("{}\n", serde_json::json!({ "path": source, "reason": reason }));
        let mut file = match self.file.take() {
            Some(file) => file,
            None => File::create(path).map_err(Error::io(path))?,
        };
        file.write_all(line.as_bytes()).map_err(Error::io(path))?;
        self.file = Some(file);
        Ok(())
    }
}

/// Counts things of which nothing can fail one by one, and tells about it.
pub(crate) struct Count {
    bar: ProgressBar,
    total: usize,
    done: usize,
    what: &'static str,
    started: Instant,
    last_line: Instant,
}

impl Count {
    /// Of `total` things, called `what`.
    pub(crate) fn new(total: usize, what: &'static str) -> Self {
        let drawn = std::io::stderr().is_terminal() && !JSON.load(Ordering::Relaxed);
        let bar = if drawn { ProgressBar::new(total as u64) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}, {per_sec}, {eta} left") {
            bar.set_style(style);
        }
        bar.set_message(what);
        let now = Instant::now();
        Self { bar, total, done: 0, what, started: now, last_line: now }
    }

    /// Counts things as done.
    pub(crate) fn advance(&mut self, count: usize) {
        self.done += count;
        self.bar.inc(count as u64);
        if self.bar.is_hidden() && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let (Self { total, done, what, .. }, rate) = (&*self, self.rate());
            let left = total.saturating_sub(*done) as f64 / rate.max(1e-9);
            let text = format!("{done}/{total} {what}, {rate:.0} {what}/s, about {left:.0} s left");
            let facts =
                json!({ "done": done, "total": total, format!("{what}_per_second"): rate, "seconds_left": left });
            event("progress", &text, facts);
        }
    }

    /// The summary: `facts`, with how long it took.
    pub(crate) fn finish(self, mut facts: Value) -> Value {
        self.bar.finish_and_clear();
        let round = |value: f64| (value * 1e3).round() / 1e3;
        facts["seconds"] = round(self.started.elapsed().as_secs_f64()).into();
        facts[format!("{}_per_second", self.what)] = round(self.rate()).into();
        facts
    }

    fn rate(&self) -> f64 {
        self.done as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_graver_exit_wins() {
        use Exit::{Failure, Interrupted, Skipped, Success};
        let grades = [Success, Skipped, Failure, Interrupted];
        for (i, &a) in grades.iter().enumerate() {
            for (j, &b) in grades.iter().enumerate() {
                assert_eq!(a.merge(b), grades[i.max(j)]);
            }
        }
        assert_eq!(grades.map(Exit::code), [0, 3, 1, 130]);
    }

    #[test]
    fn a_cause_that_the_message_holds_is_not_repeated() {
        let error = Error::io("photos")(std::io::Error::other("is gone"));
        assert_eq!(error.to_string(), "photos: is gone");
        assert!(std::error::Error::source(&error).is_some(), "else failure() need not look for repetitions");
    }

    #[test]
    fn facts_are_shown_one_a_line() {
        let facts =
            serde_json::json!({ "names": ["a", "b"], "grid": [2, 3], "config": { "encoder": { "width": 64 } } });
        assert_eq!(table(&facts), "config.encoder.width  64\ngrid                  2 x 3\nnames                 a, b");
    }
}
