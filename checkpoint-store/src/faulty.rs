//! A store that breaks its promises on request: scripted faults on top of any other store.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::{Op, Result, StoreError};
use crate::path::StorePath;
use crate::store::{Entry, PutOptions, PutReceipt, Stat, Store};

/// What happens instead of the operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is done; `Unavailable`.
    FailBefore,
    /// It is done, and yet the caller hears `Uncertain`.
    FailAfter,
    /// Nothing is done; `Full`, which no retry helps.
    Full,
    /// Nothing is done, and no answer ever comes.
    HangBefore,
    /// It is done, and no answer ever comes.
    HangAfter,
    /// A put leaves a file of this many bytes and says `Unavailable`, as a store without whole-file
    /// puts would.
    ShortWrite(usize),
    /// It is done, later.
    Slow(Duration),
}

/// When a fault strikes: every condition given must hold.
#[derive(Debug, Clone)]
pub struct FaultRule {
    op: Option<Op>,
    path_contains: String,
    at_least_replicas: Option<u16>,
    skip: u64,
    times: u64,
    fault: Fault,
}

impl FaultRule {
    /// Strikes once, at the first call of `op`.
    pub fn once(op: Op, fault: Fault) -> Self {
        FaultRule {
            op: Some(op),
            path_contains: String::new(),
            at_least_replicas: None,
            skip: 0,
            times: 1,
            fault,
        }
    }

    /// Strikes at every call of `op`.
    pub fn always(op: Op, fault: Fault) -> Self {
        Self::once(op, fault).times(u64::MAX)
    }

    /// Strikes at every call of any operation.
    pub fn any(fault: Fault) -> Self {
        FaultRule { op: None, ..Self::always(Op::Stat, fault) }
    }

    /// The same fault at so many matching calls.
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    /// Lets that many matching calls pass first.
    pub fn skip(mut self, calls: u64) -> Self {
        self.skip = calls;
        self
    }

    /// Only for paths in which this text occurs.
    pub fn on(mut self, text: &str) -> Self {
        text.clone_into(&mut self.path_contains);
        self
    }

    /// Only for puts that ask for so many copies, or for the default number.
    pub fn at_least_replicas(mut self, replicas: u16) -> Self {
        self.at_least_replicas = Some(replicas);
        self
    }

    fn matches(&self, op: Op, path: &StorePath, options: PutOptions) -> bool {
        self.op.is_none_or(|wanted| wanted == op)
            && path.as_str().contains(&self.path_contains)
            && self
                .at_least_replicas
                .is_none_or(|least| options.replicas.is_none_or(|replicas| replicas >= least))
    }

    /// Counts a matching call; the fault if it is this call's turn.
    fn strike(&mut self) -> Option<Fault> {
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times = self.times.checked_sub(1)?;
        Some(self.fault.clone())
    }
}

#[derive(Debug, Default)]
struct Script {
    rules: Vec<FaultRule>,
    /// State of the generator, and the share of calls (of 1000) that it makes fail.
    random: Option<(u64, u32)>,
    calls: Vec<(Op, StorePath)>,
    reads: Vec<(StorePath, u64)>,
}

impl Script {
    fn next(&mut self, op: Op, path: &StorePath, options: PutOptions) -> Option<Fault> {
        self.calls.push((op, path.clone()));
        let matching = self.rules.iter_mut().filter(|rule| rule.matches(op, path, options));
        let scripted = matching.filter_map(FaultRule::strike).next();
        scripted.or_else(|| self.random.as_mut().and_then(draw))
    }
}

/// One draw of a splitmix64 generator: a fault for the given share of calls, before or after the
/// effect.
fn draw((state, per_mille): &mut (u64, u32)) -> Option<Fault> {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let fault = if z & 1 == 0 { Fault::FailBefore } else { Fault::FailAfter };
    ((z >> 32) % 1000 < u64::from(*per_mille)).then_some(fault)
}

/// Wraps a store and makes its operations fail as told. Clones share the script.
#[derive(Debug, Clone)]
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    script: Arc<Mutex<Script>>,
}

impl FaultyStore {
    /// A store that passes every call through until a fault is injected.
    pub fn new(inner: Arc<dyn Store>) -> Self {
        FaultyStore { inner, script: Arc::default() }
    }

    /// Adds a rule; the first that strikes counts.
    pub fn inject(&self, rule: FaultRule) {
        self.script().rules.push(rule);
    }

    /// Makes a share of all calls fail (so many of 1000), before or after their effect, the same
    /// ones for the same seed and order of calls.
    pub fn inject_random(&self, seed: u64, per_mille: u32) {
        self.script().random = Some((seed, per_mille));
    }

    /// Heals: forgets rules and randomness.
    pub fn heal(&self) {
        let mut script = self.script();
        script.rules.clear();
        script.random = None;
    }

    /// How often an operation was called on paths that contain a text.
    pub fn calls(&self, op: Op, path_contains: &str) -> usize {
        let script = self.script();
        let matching = script
            .calls
            .iter()
            .filter(|(o, path)| *o == op && path.as_str().contains(path_contains));
        matching.count()
    }

    /// The files that were read, in order, each time with the bytes that came.
    pub fn reads(&self) -> Vec<(StorePath, u64)> {
        self.script().reads.clone()
    }

    fn has_read(&self, path: &StorePath, read: Result<Bytes>) -> Result<Bytes> {
        read.inspect(|bytes| self.script().reads.push((path.clone(), bytes.len() as u64)))
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self, op: Op, path: &StorePath, options: PutOptions) -> Option<Fault> {
        self.script().next(op, path, options)
    }

    async fn run<T>(
        &self,
        op: Op,
        path: &StorePath,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let fault = self.fault(op, path, PutOptions::default());
        disturb(fault, op, path, work).await
    }
}

async fn disturb<T>(
    fault: Option<Fault>,
    op: Op,
    path: &StorePath,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    match fault {
        None => work.await,
        Some(Fault::FailBefore | Fault::ShortWrite(_)) => {
            Err(StoreError::unavailable(op, path, "injected"))
        }
        Some(Fault::Full) => {
            Err(StoreError::Full { op, path: path.to_string(), reason: "injected".to_owned() })
        }
        Some(Fault::FailAfter) => {
            work.await?;
            Err(StoreError::Uncertain { op, path: path.to_string(), reason: "injected".to_owned() })
        }
        Some(Fault::HangBefore) => std::future::pending().await,
        Some(Fault::HangAfter) => {
            work.await?;
            std::future::pending().await
        }
        Some(Fault::Slow(delay)) => {
            tokio::time::sleep(delay).await;
            work.await
        }
    }
}

#[async_trait]
impl Store for FaultyStore {
    fn url(&self) -> &str {
        self.inner.url()
    }

    async fn create_dir_all(&self, path: &StorePath) -> Result<()> {
        self.run(Op::CreateDirAll, path, self.inner.create_dir_all(path)).await
    }

    async fn create_dir(&self, path: &StorePath) -> Result<()> {
        self.run(Op::CreateDir, path, self.inner.create_dir(path)).await
    }

    async fn put(
        &self,
        path: &StorePath,
        data: Vec<Bytes>,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        let fault = self.fault(Op::Put, path, options);
        if let Some(Fault::ShortWrite(keep)) = &fault {
            let torn: Vec<u8> = data.concat().into_iter().take(*keep).collect();
            self.inner.put(path, vec![torn.into()], options).await?;
        }
        disturb(fault, Op::Put, path, self.inner.put(path, data, options)).await
    }

    async fn put_exclusive(
        &self,
        path: &StorePath,
        data: Bytes,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        let fault = self.fault(Op::PutExclusive, path, options);
        disturb(fault, Op::PutExclusive, path, self.inner.put_exclusive(path, data, options)).await
    }

    async fn read(&self, path: &StorePath, limit: u64) -> Result<Bytes> {
        let read = self.run(Op::Read, path, self.inner.read(path, limit)).await;
        self.has_read(path, read)
    }

    async fn read_range(&self, path: &StorePath, offset: u64, len: u64) -> Result<Bytes> {
        let read = self.run(Op::ReadRange, path, self.inner.read_range(path, offset, len)).await;
        self.has_read(path, read)
    }

    async fn stat(&self, path: &StorePath) -> Result<Option<Stat>> {
        self.run(Op::Stat, path, self.inner.stat(path)).await
    }

    async fn list(&self, path: &StorePath) -> Result<Vec<Entry>> {
        self.run(Op::List, path, self.inner.list(path)).await
    }

    async fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        self.run(Op::RenameDir, from, self.inner.rename_dir(from, to)).await
    }

    async fn remove(&self, path: &StorePath) -> Result<()> {
        self.run(Op::Remove, path, self.inner.remove(path)).await
    }

    async fn check_redundancy(&self) -> Result<()> {
        self.inner.check_redundancy().await
    }

    async fn set_replication(&self, path: &StorePath, replicas: u16) -> Result<()> {
        self.run(Op::SetReplication, path, self.inner.set_replication(path, replicas)).await
    }
}
