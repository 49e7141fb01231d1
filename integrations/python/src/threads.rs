//! The threads that compute: a pool a process, since a child made by `fork` has none of its parent's threads and would wait
//! for them for ever.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Failure, guard, refuse};

/// The pool, and the process that its threads are in.
static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);

/// What `work` returns, computed on this process's threads; a panic is a failure.
pub(crate) fn on_pool<T: Send>(work: impl FnOnce() -> Result<T, Failure> + Send) -> Result<T, Failure> {
    let pool = pool()?;
    guard(|| pool.install(work))
}

fn pool() -> Result<Arc<ThreadPool>, Failure> {
    let mut held = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if let Some((owner, pool)) = &*held
        && *owner == process
    {
        return Ok(pool.clone());
    }
    // As many threads as RAYON_NUM_THREADS says, or as there are cores.
    match ThreadPoolBuilder::new().thread_name(|i| format!("vqrae-{i}")).build() {
        Ok(pool) => {
            let pool = Arc::new(pool);
            // The pool of the parent has no threads here that could be told to end, so it is not dropped but forgotten.
            std::mem::forget(held.replace((process, pool.clone())));
            Ok(pool)
        }
        Err(error) => refuse(format!("the threads to compute on cannot be started: {error}")),
    }
}
