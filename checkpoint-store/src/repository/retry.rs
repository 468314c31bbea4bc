//! How a file gets into a store that is not well.
//!
//! HDFS fails a write as a whole when it picks a dead DataNode for a new block, and it continues
//! picking it until the NameNode notices (ten minutes by default). With as many nodes as wanted
//! copies, every write fails. So: a few tries with the wanted copies, then many quick ones with
//! fewer (each has a chance to miss the dead node), and afterwards the store is asked to make up
//! the missing copies. Each try has a name of its own, because a failed one may leave something
//! behind or even arrive late.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use checkpoint_format::PackName;
use tracing::warn;

use super::bounded::Bounded;
use crate::error::{Op, Result, StoreError};
use crate::path::StorePath;
use crate::store::{PutOptions, total_len};

/// A try that hung counts as so many that failed at once.
const HUNG_TRY_COST: usize = 2;

/// How long a shortage of copies is remembered: files that follow begin with what worked last.
const SHORTAGE_MEMORY: Duration = Duration::from_secs(60);

/// How often and with how many replicas a file is tried to be stored.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Tries with the wanted number of copies.
    pub tries: u32,
    /// Tries with each smaller number, down to `minimum_replicas`. With one of three DataNodes
    /// dead, a try with two copies has a chance of about a third.
    pub tries_with_fewer: u32,
    /// The fewest copies to be content with for the moment.
    pub minimum_replicas: u16,
    /// The first pause between tries; it doubles up to `longest_pause`.
    pub first_pause: Duration,
    /// The longest pause between tries.
    pub longest_pause: Duration,
    /// No new try is begun after that long.
    pub give_up_after: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy {
            tries: 3,
            tries_with_fewer: 12,
            minimum_replicas: 1,
            first_pause: Duration::from_millis(10),
            longest_pause: Duration::from_millis(250),
            give_up_after: Duration::from_secs(120),
        }
    }
}

impl RetryPolicy {
    /// The number of copies to ask for, try by try.
    fn schedule(&self, wanted: Option<u16>) -> Vec<Option<u16>> {
        let mut schedule = vec![wanted; self.tries.max(1) as usize];
        let fewer = (self.minimum_replicas.max(1)..wanted.unwrap_or(0)).rev();
        for replicas in fewer {
            schedule.extend(std::iter::repeat_n(Some(replicas), self.tries_with_fewer as usize));
        }
        schedule
    }

    fn pause(&self, attempt: usize) -> Duration {
        let doublings = u32::try_from(attempt).unwrap_or(u32::MAX).min(16);
        self.first_pause.saturating_mul(1 << doublings).min(self.longest_pause)
    }
}

/// A file that is in the store for good, though perhaps in fewer copies than wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPack {
    /// The file's name in its checkpoint or layer.
    pub name: PackName,
    /// Bytes.
    pub len: u64,
    /// Copies that the store accepted it with and keeps it at from now on; `None` if it keeps none.
    /// HDFS may be short of some for a while, which it makes up for by itself: its client does not
    /// say how many DataNodes hold a block.
    pub replicas: Option<u16>,
    /// Copies wanted.
    pub wanted_replicas: Option<u16>,
    /// Whether the store took the request to make up for copies that are missing.
    pub more_requested: bool,
    /// Tries that it took, the successful one included.
    pub attempts: u32,
}

impl StoredPack {
    /// Whether it was written with fewer copies than wanted.
    pub fn is_short(&self) -> bool {
        self.replicas < self.wanted_replicas
    }
}

/// Does something that may be done twice, again if the store says that it can't just now. A call
/// that hung is not repeated: it had its time.
pub(crate) async fn retrying<T, F: Future<Output = Result<T>>>(call: impl Fn() -> F) -> Result<T> {
    // After 50 ms and after 100 ms.
    let pauses =
        ExponentialBuilder::new().with_min_delay(Duration::from_millis(50)).with_max_times(2);
    let is_passing = |error: &StoreError| {
        matches!(error, StoreError::Unavailable { .. } | StoreError::Uncertain { .. })
    };
    call.retry(pauses).when(is_passing).await
}

/// What to call the file at each try.
pub(crate) enum Naming<'a> {
    /// `stem.pack`, then `stem-2.pack` and so on.
    Stem(&'a str),
    /// Always this; what a failed try left is removed before the next.
    Fixed(&'a str),
}

impl Naming<'_> {
    fn name(&self, attempt: u32) -> String {
        match self {
            Naming::Stem(stem) if attempt == 1 => format!("{stem}.pack"),
            Naming::Stem(stem) => format!("{stem}-{attempt}.pack"),
            Naming::Fixed(name) => (*name).to_owned(),
        }
    }
}

/// The policy, and what the store could do lately.
#[derive(Debug)]
pub(crate) struct Retry {
    policy: RetryPolicy,
    /// Copies wanted; `None` where the store keeps none.
    wanted: Option<u16>,
    shortage: Mutex<Option<(u16, Instant)>>,
}

impl Retry {
    pub(crate) fn new(policy: RetryPolicy, wanted: Option<u16>) -> Self {
        Retry { policy, wanted, shortage: Mutex::default() }
    }

    /// Where in the schedule to begin: at the start, or during a shortage with the copies that
    /// worked last.
    fn beginning(&self, schedule: &[Option<u16>]) -> usize {
        let shortage = *self.shortage.lock().unwrap_or_else(PoisonError::into_inner);
        match shortage {
            Some((worked, at)) if at.elapsed() < SHORTAGE_MEMORY => {
                schedule.iter().position(|replicas| *replicas == Some(worked)).unwrap_or(0)
            }
            _ => 0,
        }
    }

    fn remember(&self, pack: &StoredPack) {
        if let (true, Some(worked)) = (pack.is_short(), pack.replicas) {
            *self.shortage.lock().unwrap_or_else(PoisonError::into_inner) =
                Some((worked, Instant::now()));
        }
    }
}

/// Puts one file into `dir`, trying as the policy says. A loop of its own: each try has its number
/// of copies and its name, and what one costs depends on how it failed.
pub(crate) async fn store_file(
    store: &Bounded,
    retry: &Retry,
    dir: &StorePath,
    naming: Naming<'_>,
    data: Vec<Bytes>,
) -> Result<StoredPack> {
    let (policy, wanted) = (&retry.policy, retry.wanted);
    let schedule = policy.schedule(wanted);
    let begun = Instant::now();
    let (mut position, mut attempts) = (retry.beginning(&schedule), 0);
    let mut leftovers = Vec::new();
    loop {
        attempts += 1;
        let name = pack_name(&naming.name(attempts))?;
        let path = dir.join(name.as_str())?;
        if matches!(naming, Naming::Fixed(_)) && attempts > 1 {
            store.remove(&path).await?;
        }
        let options = PutOptions { replicas: schedule[position] };
        let error = match put_checked(store, &path, data.clone(), options).await {
            Ok(replicas) => {
                remove_leftovers(store, leftovers).await;
                let len = total_len(&data);
                let pack = acknowledge(store, &path, name, len, replicas, wanted, attempts).await;
                retry.remember(&pack);
                return Ok(pack);
            }
            Err(error) => error,
        };
        position += if error.is_ambiguous() { HUNG_TRY_COST } else { 1 };
        let over = position >= schedule.len() || begun.elapsed() >= policy.give_up_after;
        if over || !may_try_again(&error) {
            return Err(error);
        }
        warn!(%path, attempts, %error, "put failed, trying again");
        if path.name() != naming.name(attempts + 1) {
            leftovers.push(path);
        }
        tokio::time::sleep(policy.pause(attempts as usize - 1)).await;
    }
}

/// Puts a small file that exactly one caller may create, trying with fewer copies like
/// [`store_file`], but always under the one name. An error that leaves the outcome open ends it:
/// the caller must look.
pub(crate) async fn store_exclusive(
    store: &Bounded,
    retry: &Retry,
    path: &StorePath,
    data: &Bytes,
) -> Result<()> {
    let schedule = retry.policy.schedule(retry.wanted);
    let begun = Instant::now();
    let mut position = retry.beginning(&schedule);
    loop {
        let options = PutOptions { replicas: schedule[position] };
        let error = match store.put_exclusive(path, data.clone(), options).await {
            Ok(receipt) if receipt.replicas < retry.wanted => {
                ask_for_more(store, path, receipt.replicas, retry.wanted).await;
                return Ok(());
            }
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        position += 1;
        let over = position >= schedule.len() || begun.elapsed() >= retry.policy.give_up_after;
        if over || error.is_ambiguous() || !error.is_retryable() {
            return Err(error);
        }
        tokio::time::sleep(retry.policy.pause(position)).await;
    }
}

/// A taken name is a leftover of ours (partial directories have one writer): the next name is free.
fn may_try_again(error: &StoreError) -> bool {
    error.is_retryable() || error.is_already_exists()
}

fn pack_name(name: &str) -> Result<PackName> {
    PackName::new(name).map_err(|_| StoreError::InvalidPath {
        text: name.chars().take(256).collect(),
        reason: "it is no valid file name in a checkpoint",
    })
}

async fn put_checked(
    store: &Bounded,
    path: &StorePath,
    data: Vec<Bytes>,
    options: PutOptions,
) -> Result<Option<u16>> {
    let len = total_len(&data);
    let receipt = store.put(path, data, options).await?;
    if receipt.len != len {
        let reason = format!("{} of {len} bytes were stored", receipt.len);
        return Err(StoreError::unavailable(Op::Put, path, reason));
    }
    Ok(receipt.replicas)
}

/// A failed try may have left a file after all; the checkpoint does without it, and space is all it
/// costs.
async fn remove_leftovers(store: &Bounded, leftovers: Vec<StorePath>) {
    for path in leftovers {
        if let Err(error) = store.remove(&path).await {
            warn!(%path, %error, "a leftover of a failed put stays");
        }
    }
}

async fn acknowledge(
    store: &Bounded,
    path: &StorePath,
    name: PackName,
    len: u64,
    replicas: Option<u16>,
    wanted: Option<u16>,
    attempts: u32,
) -> StoredPack {
    let mut pack = StoredPack {
        name,
        len,
        replicas,
        wanted_replicas: replicas.and(wanted),
        more_requested: false,
        attempts,
    };
    if pack.is_short() {
        pack.more_requested = ask_for_more(store, path, replicas, wanted).await;
    }
    pack
}

/// Whether the store took the request.
async fn ask_for_more(
    store: &Bounded,
    path: &StorePath,
    replicas: Option<u16>,
    wanted: Option<u16>,
) -> bool {
    let Some(wanted) = wanted else { return false };
    warn!(%path, replicas, wanted, "stored with fewer copies than wanted");
    match store.set_replication(path, wanted).await {
        Ok(()) => true,
        Err(error) => {
            warn!(%path, %error, "missing copies could not be asked for");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_steps_down_to_the_minimum() {
        let policy = RetryPolicy {
            tries: 2,
            tries_with_fewer: 3,
            minimum_replicas: 1,
            ..RetryPolicy::default()
        };
        let expected: Vec<Option<u16>> = [3, 3, 2, 2, 2, 1, 1, 1].map(Some).to_vec();
        assert_eq!(policy.schedule(Some(3)), expected);
        assert_eq!(policy.schedule(None), [None, None]);
        assert_eq!(policy.schedule(Some(1)), [Some(1), Some(1)]);
    }

    #[test]
    fn a_minimum_is_kept() {
        let policy = RetryPolicy { minimum_replicas: 2, ..RetryPolicy::default() };
        assert!(policy.schedule(Some(3)).iter().all(|replicas| *replicas >= Some(2)));
    }

    #[test]
    fn a_shortage_is_remembered() {
        let retry = Retry::new(RetryPolicy::default(), Some(3));
        let schedule = retry.policy.schedule(Some(3));
        assert_eq!(retry.beginning(&schedule), 0);
        retry.remember(&StoredPack {
            name: PackName::new("a").expect("valid"),
            len: 0,
            replicas: Some(2),
            wanted_replicas: Some(3),
            more_requested: true,
            attempts: 5,
        });
        assert_eq!(schedule[retry.beginning(&schedule)], Some(2));
    }

    #[test]
    fn pauses_are_bounded() {
        let policy = RetryPolicy::default();
        assert_eq!(policy.pause(0), policy.first_pause);
        assert_eq!(policy.pause(usize::MAX), policy.longest_pause);
    }
}
