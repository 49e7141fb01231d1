//! Ctrl-C and SIGTERM, which end a run where all that is written is whole.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use crate::report::Exit;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C and SIGTERM end a run after the batch at hand; the second time, at once.
pub(crate) fn catch_interrupts() -> Result<()> {
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(Exit::Interrupted.code().into());
        }
    };
    ctrlc::set_handler(handler).context("the handler of Ctrl-C could not be set")
}

/// Whether Ctrl-C or SIGTERM has come.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
