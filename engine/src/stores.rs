//! Opening a store, everywhere in the same way.

use anyhow::Context;
use checkpoint_store::{
    HdfsOptions, Mode, Repository, RepositoryOptions, RetryPolicy, Store, StoreOptions,
};
use std::sync::Arc;
use std::time::Duration;
use vm::error::{EngineError, InPhase, Phase, usage};

/// How long one call to the store, or a write without progress, may take.
/// `STILLPOINT_STORE_TIMEOUT` (seconds) changes it.
const TIMEOUT: Duration = Duration::from_secs(20);
/// A file is retried for this many times the timeout: after two tries that hang there is still time
/// for a third.
const TRIES: u32 = 3;

pub(crate) async fn open(url: &str, mode: Mode) -> Result<Repository, EngineError> {
    let timeout = timeout()?;
    let retry = RetryPolicy { give_up_after: timeout * TRIES, ..RetryPolicy::default() };
    let options = RepositoryOptions { retry, ..RepositoryOptions::default() };
    Repository::open_with(connect(url)?, mode, options)
        .await
        .with_context(|| format!("opening the store {url}"))
        .in_phase(Phase::Open)
}

/// The store for reading; a directory that is no store is not made one.
///
/// # Errors
/// Usage when the URL is none that is known; class store when the store does not answer, refused
/// when there is none.
pub async fn open_existing(url: &str) -> Result<Repository, EngineError> {
    open(&absolute(url)?, Mode::MustExist).await
}

/// The URL with an absolute path: `file:` stores may be named relative to the working directory,
/// and the helper has another one.
///
/// # Errors
/// When the working directory cannot be found.
pub fn absolute(url: &str) -> Result<String, EngineError> {
    match url.strip_prefix("file:") {
        // Two slashes begin a host, which is always empty.
        Some(rest) if !rest.is_empty() && !rest.starts_with("//") => {
            let path = std::path::absolute(rest)
                .with_context(|| format!("making store {url} absolute"))
                .in_phase(Phase::Open)?;
            Ok(format!("file://{}", path.display()))
        }
        _ => Ok(url.to_owned()),
    }
}

/// The store of that URL; nothing is contacted yet.
///
/// # Errors
/// Usage when the URL is none that is known, or `STILLPOINT_STORE_TIMEOUT` is no number of seconds.
pub fn connect(url: &str) -> Result<Arc<dyn Store>, EngineError> {
    let timeout = timeout()?;
    let hdfs =
        HdfsOptions { call_timeout: timeout, stall_timeout: timeout, ..HdfsOptions::default() };
    checkpoint_store::open(url, &StoreOptions { hdfs }).in_phase(Phase::Open)
}

fn timeout() -> Result<Duration, EngineError> {
    const VARIABLE: &str = "STILLPOINT_STORE_TIMEOUT";
    let Ok(text) = std::env::var(VARIABLE) else { return Ok(TIMEOUT) };
    match text.parse() {
        Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
        _ => Err(usage(format!("{VARIABLE}={text} is no number of seconds from 1 to 3600")))
            .in_phase(Phase::Open),
    }
}
