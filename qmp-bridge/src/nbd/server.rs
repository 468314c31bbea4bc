//! An NBD server of read-only exports, whose content is made when it is read.
//!
//! Fixed newstyle, simple and structured replies, block status (`base:allocation`), several
//! connections, and on each several requests that are answered as they are done. A client is as
//! little believed as a server is by [`super::NbdClient`]: all lengths are bounded, and what is
//! read for it is held in a bounded amount of memory. An error of the content is the answer to the
//! request that met it; the connection continues.
//!
//! Everything follows `doc/proto.md` of the NBD project. QEMU gives up a connection for good when a
//! server breaks the protocol, but reconnects (`reconnect-delay`) when it merely ends.

mod handshake;
mod transmission;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::NbdError;
use super::extents::Extent;
use super::wire::MAX_STRING;

/// Connections at a time: QEMU has one for each disk. Others wait until one ends.
const MAX_CONNECTIONS: usize = 256;
/// Bytes that were read for clients and are not sent yet, over all connections.
const BUFFERED_BYTES: u32 = 64 << 20;
/// For the whole handshake; QEMU does it in a few milliseconds.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two tries to accept, when the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why content cannot be had; the client gets `EIO` and this text.
#[derive(Debug, Clone, Error)]
#[error("{0}")]
pub struct ExportError(pub String);

/// What can be read. Its length and content never change.
pub trait Export: Send + Sync {
    /// Length in bytes.
    fn size(&self) -> u64;

    /// Exactly these bytes; the range is within the export and at most
    /// [`MAX_REQUEST`](super::MAX_REQUEST) long. It may take any time.
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ExportError>>;

    /// Extents from the start of the range on, ascending and without gaps, with the flags of
    /// `base:allocation`. At least one; they may end before the range or after it.
    fn status(&self, range: Range<u64>) -> BoxFuture<'_, Result<Vec<Extent>, ExportError>>;
}

/// The exports of a server by name; clones share them.
#[derive(Clone)]
pub struct Exports(Arc<Shared>);

struct Shared {
    by_name: BTreeMap<String, Arc<dyn Export>>,
    /// A permit for each byte that may still be buffered.
    buffer: Semaphore,
}

impl fmt::Debug for Exports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Exports").field(&self.0.by_name.keys()).finish()
    }
}

impl Exports {
    /// # Errors
    /// When a name is longer than the protocol allows (4,096 bytes).
    pub fn new(by_name: BTreeMap<String, Arc<dyn Export>>) -> Result<Self, NbdError> {
        if let Some(long) = by_name.keys().find(|name| name.len() > MAX_STRING as usize) {
            return Err(NbdError::Refused {
                what: format!("an export name of {} bytes", long.len()),
                why: format!("it is longer than {MAX_STRING} bytes"),
            });
        }
        let buffer = Semaphore::new(BUFFERED_BYTES as usize);
        Ok(Self(Arc::new(Shared { by_name, buffer })))
    }

    fn get(&self, name: &str) -> Option<&Arc<dyn Export>> {
        self.0.by_name.get(name)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.0.by_name.keys().map(String::as_str)
    }

    /// Serves one client until it leaves. Its requests run as tasks of this runtime.
    ///
    /// # Errors
    /// When the connection ends without farewell or the client breaks the protocol.
    pub async fn serve(
        &self,
        read: impl AsyncRead + Send + Unpin,
        mut write: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Result<(), NbdError> {
        let mut read = BufReader::new(read);
        let negotiation = async {
            let mut both = tokio::io::join(&mut read, &mut write);
            handshake::negotiate(&mut both, self).await
        };
        let session = tokio::time::timeout(HANDSHAKE_TIMEOUT, negotiation).await;
        match session.map_err(|_| NbdError::Closed("no handshake in time".into()))?? {
            Some(session) => transmission::run(read, write, session, self.clone()).await,
            None => Ok(()),
        }
    }
}

/// A server that listens; dropping it ends it and its connections. The socket's file is its
/// maker's.
#[derive(Debug)]
pub struct NbdServer {
    task: JoinHandle<()>,
}

impl NbdServer {
    /// Serves every client of the listener from now on.
    pub fn start(listener: UnixListener, exports: Exports) -> Self {
        Self { task: tokio::spawn(accept(listener, exports)) }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: UnixListener, exports: Exports) {
    let mut connections = JoinSet::new();
    loop {
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting an NBD client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let exports = exports.clone();
        connections.spawn(async move {
            let (read, write) = stream.into_split();
            if let Err(error) = exports.serve(read, write).await {
                tracing::debug!(%error, "an NBD client's connection ended");
            }
        });
    }
}

#[cfg(test)]
mod test;
