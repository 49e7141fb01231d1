//! Words → folders: a model's folder on this disk, or `OWNER/NAME[@REVISION]` of the Hugging Face hub, found in the cache or
//! downloaded into it. The only file that knows the hub; it stands in the program because the library reads folders, and no
//! network.
//!
//! The cache is laid out as `huggingface_hub` does it, so that both share their downloads:
//! `models--OWNER--NAME/{refs/REVISION, snapshots/COMMIT/FILE, blobs/ETAG}`.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use vqrae::weights::{self, Store};

const CONFIG: &str = "config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";

/// What to do about a file of the cache that is not what it should be.
const DELETE: &str = "delete this file and run the same command again to download it anew";

/// The folder that a word means: itself if it exists, else the model of the hub that it names.
///
/// What is in the cache is taken as it is, without asking the network whether there is something newer. The environment
/// variables are those of `huggingface_hub`: HF_HOME and HF_HUB_CACHE (where the cache is), HF_TOKEN, HF_ENDPOINT,
/// HF_HUB_OFFLINE.
pub(crate) fn folder(word: &Path) -> Result<PathBuf> {
    if word.exists() {
        return Ok(word.to_path_buf());
    }
    let Some(name) = word.to_str().and_then(Name::parse) else {
        bail!(
            "{}: no such folder; expected: a folder, or OWNER/NAME[@REVISION] of the Hugging Face hub",
            word.display()
        );
    };
    let cache = cache_folder()?;
    let snapshot = name.snapshot(&cache);
    let missing = snapshot.as_deref().map(missing).transpose()?;
    if let (Some(snapshot), Some([])) = (&snapshot, missing.as_deref()) {
        check(snapshot)?;
        return Ok(snapshot.clone());
    }
    let lacking = match missing {
        Some(missing) => format!("{} of it is missing", missing.join(", ")),
        None => "it is not there".to_string(),
    };
    let found = format!("no folder {0} here, and of the cache {1}, {lacking}", word.display(), cache.display());
    if is_offline() {
        bail!("{found}; HF_HUB_OFFLINE forbids to download it: unset it, or copy the model's folder here");
    }
    let snapshot = download::model(&name, &cache).with_context(|| found)?;
    check(&snapshot)?;
    Ok(snapshot)
}

/// A model of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    /// `OWNER/NAME`
    repository: String,
    /// A branch, a tag or a commit.
    revision: String,
}

impl Name {
    fn parse(word: &str) -> Option<Self> {
        let (repository, revision) = word.split_once('@').unwrap_or((word, "main"));
        let (owner, name) = repository.split_once('/')?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let part = |part: &str| {
            !part.is_empty() && part.chars().all(plain) && !part.starts_with(['.', '-']) && !part.contains("--")
        };
        let valid = part(owner)
            && part(name)
            && revision.chars().all(|c| plain(c) || c == '/')
            && is_below(revision)
            && !revision.starts_with('-');
        valid.then(|| Self { repository: repository.to_string(), revision: revision.to_string() })
    }

    fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.repository.replace('/', "--")))
    }

    /// The folder of the revision, if anything of it was downloaded.
    fn snapshot(&self, cache: &Path) -> Option<PathBuf> {
        let folder = self.folder(cache);
        let commit = std::fs::read_to_string(folder.join("refs").join(&self.revision));
        let commit = commit.unwrap_or_else(|_| self.revision.clone());
        let commit = commit.trim();
        let snapshot = folder.join("snapshots").join(commit);
        (is_below(commit) && snapshot.is_dir()).then_some(snapshot)
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.repository, self.revision)
    }
}

/// Whether a relative path stays below the folder that it is joined to.
fn is_below(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// An environment variable that is set to something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

fn home() -> Result<PathBuf> {
    match (variable("HF_HOME"), std::env::home_dir()) {
        (Some(folder), _) => Ok(PathBuf::from(folder)),
        (None, Some(home)) => Ok(home.join(".cache/huggingface")),
        (None, None) => bail!("this user has no home folder for the hub's cache; set HF_HOME to a folder"),
    }
}

/// Where the cache is.
pub(crate) fn cache_folder() -> Result<PathBuf> {
    variable("HF_HUB_CACHE").map_or_else(|| Ok(home()?.join("hub")), |folder| Ok(PathBuf::from(folder)))
}

/// As `huggingface_hub` reads its flags.
fn is_offline() -> bool {
    let yes = ["1", "on", "yes", "true"];
    variable("HF_HUB_OFFLINE").is_some_and(|value| yes.contains(&value.to_lowercase().as_str()))
}

/// The files with tensors of a folder: one, or the shards of the index; none if there is neither.
fn tensor_files(folder: &Path) -> Result<Vec<String>> {
    let index = folder.join(weights::INDEX);
    if !folder.join(weights::FILE).exists() && index.exists() {
        return Ok(weights::shards(&index).with_context(|| DELETE)?.into_iter().collect());
    }
    Ok(vec![weights::FILE.to_string()])
}

/// Which files a model needs that a folder lacks.
fn missing(folder: &Path) -> Result<Vec<String>> {
    let mut files = vec![CONFIG.to_string(), PREPROCESSOR.to_string()];
    files.extend(tensor_files(folder)?);
    files.retain(|file| !folder.join(file).exists());
    Ok(files)
}

/// Refuses files with tensors that are not whole.
fn check(folder: &Path) -> Result<()> {
    for file in tensor_files(folder)? {
        Store::open_file(&folder.join(file)).map_err(|error| anyhow!("{error}: {DELETE}"))?;
    }
    Ok(())
}

/// One revision of one model of the cache.
#[derive(Debug, Serialize)]
pub(crate) struct Cached {
    /// `OWNER/NAME`
    pub(crate) repository: String,
    /// The branches and tags that were asked for by name.
    pub(crate) revisions: Vec<String>,
    pub(crate) commit: String,
    /// The `model_type` of config.json.
    pub(crate) model_type: Option<String>,
    pub(crate) bytes: u64,
    /// Files that a model needs and that are not there.
    pub(crate) missing: Vec<String>,
    pub(crate) folder: PathBuf,
}

/// The models of the cache, in the order of their names.
pub(crate) fn cached() -> Result<Vec<Cached>> {
    let cache = cache_folder()?;
    let mut models = Vec::new();
    for folder in folders(&cache) {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let Some(repository) = name.strip_prefix("models--").map(|name| name.replacen("--", "/", 1)) else { continue };
        let refs = references(&folder.join("refs"));
        for snapshot in folders(&folder.join("snapshots")) {
            let commit = snapshot.file_name().unwrap_or_default().to_string_lossy().to_string();
            models.push(Cached {
                repository: repository.clone(),
                revisions: refs.get(&commit).cloned().unwrap_or_default(),
                model_type: model_type(&snapshot.join(CONFIG)),
                bytes: bytes(&snapshot),
                // An index that cannot be read is found out, and told, when the model is used.
                missing: missing(&snapshot).unwrap_or_else(|_| vec![weights::INDEX.to_string()]),
                commit,
                folder: snapshot,
            });
        }
    }
    Ok(models)
}

/// The folders of a folder in their order; none if it cannot be read.
fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let mut folders: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

/// The names that stand for a commit.
fn references(folder: &Path) -> BTreeMap<String, Vec<String>> {
    let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in walkdir::WalkDir::new(folder).sort_by_file_name().into_iter().flatten() {
        if let (true, Ok(commit)) = (entry.file_type().is_file(), std::fs::read_to_string(entry.path())) {
            let name = entry.path().strip_prefix(folder).unwrap_or(entry.path()).to_string_lossy().to_string();
            names.entry(commit.trim().to_string()).or_default().push(name);
        }
    }
    names
}

fn model_type(config: &Path) -> Option<String> {
    let config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(config).ok()?).ok()?;
    config["model_type"].as_str().map(str::to_string)
}

/// The size of the files of a snapshot, which are links.
fn bytes(folder: &Path) -> u64 {
    let files = walkdir::WalkDir::new(folder).into_iter().flatten();
    files.filter_map(|file| file.path().metadata().ok()).filter(|file| file.is_file()).map(|file| file.len()).sum()
}

#[cfg(not(feature = "hub"))]
mod download {
    use super::*;

    pub(super) fn model(_: &Name, _: &Path) -> Result<PathBuf> {
        bail!("this program was built without the hub; build with --features hub or download the folder")
    }
}

#[cfg(feature = "hub")]
mod download {
    use std::time::Duration;

    use hf_hub::api::Progress;
    use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo, Metadata};
    use hf_hub::{Cache, Repo, RepoType};

    use super::*;
    use crate::report::{self, Download};

    /// How often a file is tried in one run; what has come of it is kept.
    const ATTEMPTS: u32 = 4;

    /// Downloads what is missing of a model; its folder.
    pub(super) fn model(name: &Name, cache: &Path) -> Result<PathBuf> {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let endpoint = endpoint.trim_end_matches('/').to_string();
        let token = match variable("HF_TOKEN") {
            Some(token) => Some(token),
            // Where `huggingface-cli login` leaves it.
            None => Cache::new(home()?.join("hub")).token(),
        };
        let cache = Cache::new(cache.to_path_buf());
        let api = ApiBuilder::from_cache(cache.clone()).with_endpoint(endpoint.clone()).with_token(token.clone());
        let hub = Hub { api: api.build()?, cache, endpoint, has_token: token.is_some(), name };

        let snapshot = hub.need(CONFIG, None)?;
        let commit = Some(snapshot.as_path());
        hub.need(PREPROCESSOR, commit)?;
        if hub.fetch(weights::FILE, commit)?.is_none() {
            if hub.fetch(weights::INDEX, commit)?.is_none() {
                let files = hub.files(&name.revision).unwrap_or_default().join(", ");
                bail!(
                    "{name} has neither {} nor {}; its files: {files}. A checkpoint of PyTorch becomes a model by \
                     `vqrae-cli convert`",
                    weights::FILE,
                    weights::INDEX
                );
            }
            for shard in tensor_files(&snapshot)? {
                hub.need(&shard, commit)?;
            }
        }
        Ok(snapshot)
    }

    struct Hub<'a> {
        api: Api,
        cache: Cache,
        endpoint: String,
        has_token: bool,
        name: &'a Name,
    }

    impl Hub<'_> {
        fn repo(&self, revision: &str) -> Repo {
            Repo::with_revision(self.name.repository.clone(), RepoType::Model, revision.to_string())
        }

        /// The names of the files of a revision; none if the hub has no such revision.
        fn files(&self, revision: &str) -> Option<Vec<String>> {
            let info = self.api.repo(self.repo(revision)).info().ok()?;
            Some(info.siblings.into_iter().map(|file| file.rfilename).collect())
        }

        /// [`Hub::fetch`] of a file that must be there.
        fn need(&self, file: &str, snapshot: Option<&Path>) -> Result<PathBuf> {
            match self.fetch(file, snapshot)? {
                Some(snapshot) => Ok(snapshot),
                None => Err(self.not_found(file)),
            }
        }

        fn not_found(&self, file: &str) -> anyhow::Error {
            let (name, endpoint) = (self.name, &self.endpoint);
            if let Some(files) = self.files(&name.revision) {
                return anyhow!("{name} has no {file}, which a model needs; its files: {}", files.join(", "));
            }
            if name.revision != "main" && self.files("main").is_some() {
                return anyhow!("{} has no revision {} on {endpoint}", name.repository, name.revision);
            }
            anyhow!("there is no {name} with a {file} on {endpoint}; check the spelling of OWNER/NAME[@REVISION]")
        }

        /// Downloads a file, unless it is there; the folder of its commit, or none where the hub has no such file.
        fn fetch(&self, file: &str, snapshot: Option<&Path>) -> Result<Option<PathBuf>> {
            let repo = self.api.repo(self.repo(&self.name.revision));
            let Some(metadata) = self.retry(file, || self.api.metadata(&repo.url(file)))? else { return Ok(None) };
            if !is_below(metadata.etag()) || !is_below(metadata.commit_hash()) {
                bail!("{}: {file} has an etag or a commit that is no name of a file", self.endpoint);
            }
            let cached = self.cache.repo(self.repo(&self.name.revision));
            let folder = cached.pointer_path(metadata.commit_hash());
            if snapshot.is_some_and(|snapshot| snapshot != folder) {
                bail!("{} has changed while it was downloaded; run the same command again", self.name);
            }
            let (blob, pointer) = (cached.blob_path(metadata.etag()), folder.join(file));
            if pointer.metadata().is_ok_and(|found| found.len() == metadata.size() as u64) {
                cached.create_ref(metadata.commit_hash())?;
                return Ok(Some(folder));
            }
            for _ in 0..ATTEMPTS {
                prepare(&blob, &pointer, metadata.size() as u64)?;
                let Some(()) = self.retry(file, || download(&repo, file))? else { return Ok(None) };
                if self.is_whole(&blob, &pointer, &metadata)? {
                    return Ok(Some(folder));
                }
            }
            let part = blob.with_extension(PART);
            bail!(
                "{}: the hub says that {file} has {} bytes, and sends {}; run the same command again to go on, or \
                 delete this file to start anew",
                part.display(),
                metadata.size(),
                part.metadata().map_or(0, |found| found.len())
            )
        }

        /// Whether all of a file has come. What is too short becomes a half download again.
        fn is_whole(&self, blob: &Path, pointer: &Path, metadata: &Metadata) -> Result<bool> {
            let (found, size) = (blob.metadata()?.len(), metadata.size() as u64);
            if found == size {
                return Ok(true);
            }
            std::fs::remove_file(pointer)?;
            if found > size {
                std::fs::remove_file(blob)?;
                bail!(
                    "{}: has {found} bytes, but the hub says {size}; it was deleted: run the same command again",
                    pointer.display()
                );
            }
            std::fs::rename(blob, blob.with_extension(PART))?;
            Ok(false)
        }

        /// Tries again what a lost connection or a busy server ends; none where the hub says that there is no such file.
        fn retry<T>(&self, file: &str, mut act: impl FnMut() -> Result<T, ApiError>) -> Result<Option<T>> {
            let mut attempt = 1;
            loop {
                let error = match act() {
                    Ok(value) => return Ok(Some(value)),
                    Err(error) => error,
                };
                match status(&error) {
                    Some(404) => return Ok(None),
                    Some(401 | 403) => return Err(self.forbidden(&error)),
                    Some(code) if code < 500 && code != 429 => return Err(self.failed(file, &error)),
                    None if !is_network(&error) => return Err(self.failed(file, &error)),
                    _ if attempt == ATTEMPTS => return Err(self.failed(file, &error)),
                    _ => report::say(&format!("{}: {file}: {error}; trying again", self.name)),
                }
                std::thread::sleep(Duration::from_millis(250 << attempt));
                attempt += 1;
            }
        }

        fn forbidden(&self, error: &ApiError) -> anyhow::Error {
            let next = if self.has_token {
                "the token that is set (HF_TOKEN, or the file `token` of HF_HOME) may not read it"
            } else {
                "set HF_TOKEN to a token that may read it"
            };
            let (name, endpoint) = (self.name, &self.endpoint);
            anyhow!("{name} is private, gated or not on {endpoint} ({error}): {next}")
        }

        fn failed(&self, file: &str, error: &ApiError) -> anyhow::Error {
            let (name, endpoint) = (self.name, &self.endpoint);
            match error {
                ApiError::LockAcquisition(path) => {
                    anyhow!(
                        "{}: another program is downloading {file} of {name}; wait until it is done",
                        path.display()
                    )
                }
                _ => anyhow!(
                    "{file} of {name} could not be downloaded from {endpoint}: {error}; check the network or HF_ENDPOINT \
                     and run the same command again: it goes on where it stopped"
                ),
            }
        }
    }

    /// What hf-hub calls a file that is not all there yet.
    const PART: &str = "part";

    /// Puts right what hf-hub trips over: a link whose file was deleted, and a part that has nothing left to ask for.
    fn prepare(blob: &Path, pointer: &Path, size: u64) -> Result<()> {
        if pointer.symlink_metadata().is_ok() {
            std::fs::remove_file(pointer)?;
        }
        let part = blob.with_extension(PART);
        match part.metadata() {
            Ok(found) if found.len() == size && size > 0 => {
                Ok(std::fs::File::options().write(true).open(&part)?.set_len(size - 1)?)
            }
            Ok(found) if found.len() > size => Ok(std::fs::remove_file(&part)?),
            _ => Ok(()),
        }
    }

    fn download(repo: &ApiRepo, file: &str) -> Result<(), ApiError> {
        repo.download_with_progress(file, Bar(None)).map(drop)
    }

    /// hf-hub tells a size twice, and then counts what an earlier run has left.
    struct Bar(Option<Download>);

    impl Progress for Bar {
        fn init(&mut self, size: usize, file: &str) {
            self.0 = Some(Download::new(file, size as u64));
        }

        fn update(&mut self, bytes: usize) {
            if let Some(download) = &mut self.0 {
                download.advance(bytes as u64);
            }
        }

        fn finish(&mut self) {
            if let Some(download) = self.0.take() {
                download.finish();
            }
        }
    }

    /// What the server answered, if it did.
    fn status(error: &ApiError) -> Option<u16> {
        match error {
            ApiError::RequestError(error) => match error.as_ref() {
                ureq::Error::StatusCode(code) => Some(*code),
                _ => None,
            },
            _ => None,
        }
    }

    fn is_network(error: &ApiError) -> bool {
        use ureq::Error::{BadUri, RequireHttpsOnly};
        match error {
            ApiError::RequestError(error) => !matches!(error.as_ref(), BadUri(_) | RequireHttpsOnly(_)),
            ApiError::IoError(error) => {
                use std::io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem, StorageFull};
                !matches!(error.kind(), StorageFull | PermissionDenied | NotFound | ReadOnlyFilesystem)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        let name = |repository: &str, revision: &str| {
            Some(Name { repository: repository.to_string(), revision: revision.to_string() })
        };
        assert_eq!(Name::parse("google/siglip2-base"), name("google/siglip2-base", "main"));
        assert_eq!(Name::parse("a/b_c.d@refs/pr/2"), name("a/b_c.d", "refs/pr/2"));
        for path in
            ["model", "a/b/c", "/a/b", "./a", "../a", "a/", "/", "a/..", "a/b@", "a/b@../c", "a/b@/c", "a/b c", ""]
        {
            assert_eq!(Name::parse(path), None, "{path}");
        }
    }
}
