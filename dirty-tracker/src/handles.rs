//! What the plugin passes: file descriptors of QEMU's process, received over its socket.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use procfs_core::process::{MMPermissions, MemoryMaps};

use crate::error::TrackerError;
use crate::guest_memory::GuestMemory;
use crate::maps::{parse_maps, read_maps};
use crate::sys::receive::receive;
use plugin_protocol::wire::{FdKind, Hello, PROTOCOL_VERSION, REPLY_LEN, Reply, Status};

pub use plugin_protocol::wire::UffdSource;

/// Pause between two attempts to reach a QEMU that is still starting.
const CONNECT_PAUSE: Duration = Duration::from_millis(2);
/// The least time that a greeting gets, however late the connection was made.
const MIN_GREETING: Duration = Duration::from_millis(200);

/// QEMU's process, opened for tracking.
///
/// Holding these keeps nothing alive but the descriptors: when QEMU ends, calls on them fail with
/// "no such process". When this process ends, QEMU does not notice, and writes continue being
/// recorded in the uffd that the plugin holds.
#[derive(Debug)]
pub struct PluginHandles {
    pid: u32,
    reply: Reply,
    uffd: Option<OwnedFd>,
    pagemap: Option<File>,
    memory: Option<File>,
    maps: Option<File>,
    ram: Option<OwnedFd>,
}

impl PluginHandles {
    /// Connects and fetches everything; the connection is not needed afterwards.
    ///
    /// Waits up to `timeout` for the socket to appear, and for the plugin to answer.
    ///
    /// # Errors
    /// When nothing listens there, the plugin does not answer within `timeout`, or it speaks
    /// another version.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, TrackerError> {
        let deadline = Instant::now() + timeout;
        let mut stream = connect_until(path, deadline)?;
        let pid = check_peer(path, &stream)?;
        let left = deadline.saturating_duration_since(Instant::now()).max(MIN_GREETING);
        let (reply, fds) = greet(&mut stream, left)
            .map_err(|source| TrackerError::Greeting { path: path.to_owned(), source })?;
        let not_ours = |what| TrackerError::NotThePlugin { path: path.to_owned(), what };
        let reply =
            Reply::parse(&reply).ok_or_else(|| not_ours("its answer is not the plugin's"))?;
        if reply.version != PROTOCOL_VERSION || reply.status == Status::UnsupportedVersion {
            return Err(TrackerError::Version {
                path: path.to_owned(),
                plugin: reply.version,
                ours: PROTOCOL_VERSION,
            });
        }
        if reply.status != Status::Ok {
            return Err(not_ours("it does not know our greeting"));
        }
        Self::assign(pid, reply, fds)
            .ok_or_else(|| not_ours("the descriptors are not those that it announced"))
    }

    /// Gives each descriptor its name; `None` unless there are exactly as many as announced.
    fn assign(pid: u32, reply: Reply, fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let mut next = |kind| {
            if reply.has(kind) { fds.next().map(Some) } else { Some(None) }
        };
        let handles = Self {
            pid,
            uffd: next(FdKind::Uffd)?,
            pagemap: next(FdKind::Pagemap)?.map(File::from),
            memory: next(FdKind::Memory)?.map(File::from),
            maps: next(FdKind::Maps)?.map(File::from),
            ram: next(FdKind::Ram)?,
            reply,
        };
        fds.next().is_none().then_some(handles)
    }

    /// QEMU's process, as numbered here.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The plugin API version that QEMU accepted.
    pub fn plugin_api_version(&self) -> u32 {
        self.reply.api_version
    }

    /// How QEMU got its uffd. `None` means no tracking; the reason comes from [`Self::uffd`].
    pub fn uffd_source(&self) -> UffdSource {
        self.reply.uffd_source
    }

    /// The userfaultfd features that QEMU's kernel offers.
    pub fn uffd_features(&self) -> u64 {
        self.reply.uffd_features
    }

    /// Whether missing pages can be filled on demand, faults of the kernel itself included.
    pub fn can_fill(&self) -> bool {
        matches!(self.reply.uffd_source, UffdSource::Syscall | UffdSource::Device)
    }

    /// QEMU's userfaultfd.
    ///
    /// # Errors
    /// When the plugin has none.
    pub fn uffd(&self) -> Result<BorrowedFd<'_>, TrackerError> {
        let remedy = "run QEMU on Linux 6.7 or later, with access to /dev/userfaultfd";
        self.open(FdKind::Uffd, "userfaultfd", remedy, self.uffd.as_ref().map(AsFd::as_fd))
    }

    /// `/proc/PID/pagemap` of QEMU.
    ///
    /// # Errors
    /// When the plugin could not open it.
    pub fn pagemap(&self) -> Result<&File, TrackerError> {
        self.open(
            FdKind::Pagemap,
            "page map",
            "is /proc mounted where QEMU runs?",
            self.pagemap.as_ref(),
        )
    }

    /// `/proc/PID/mem` of QEMU, read-only. Its position is shared with other holders: read at
    /// offsets.
    ///
    /// # Errors
    /// When the plugin could not open it.
    pub fn memory(&self) -> Result<&File, TrackerError> {
        self.open(
            FdKind::Memory,
            "memory",
            "is /proc mounted where QEMU runs?",
            self.memory.as_ref(),
        )
    }

    /// QEMU's memory map as it is now, ascending by address.
    ///
    /// # Errors
    /// When the plugin could not open QEMU's memory map, or it cannot be read or parsed.
    pub fn maps(&self) -> Result<MemoryMaps, TrackerError> {
        let remedy = "is /proc mounted where QEMU runs?";
        let maps = self.open(FdKind::Maps, "memory map", remedy, self.maps.as_ref())?;
        let bytes = read_maps(maps).map_err(|source| TrackerError::Maps { source })?;
        parse_maps(&bytes).map_err(|error| TrackerError::MapsForm { error: error.to_string() })
    }

    /// The RAM file that QEMU was given with `ramfd=`, if it was.
    ///
    /// # Errors
    /// When the map or the memory file cannot be read.
    pub fn ram(&self, name: &str) -> Result<Option<GuestMemory>, TrackerError> {
        let Some(fd) = &self.ram else {
            let error = self.reply.errno[FdKind::Ram as usize];
            return match error {
                0 => Ok(None),
                _ => self.open(
                    FdKind::Ram,
                    "RAM file",
                    "let QEMU inherit the descriptor that ramfd= names",
                    None,
                ),
            };
        };
        let copy = fd.try_clone().map_err(|source| TrackerError::MissingHandle {
            what: "RAM file",
            remedy: "raise the limit of open files of this process",
            source,
        })?;
        GuestMemory::from_fd(name, copy).map(Some)
    }

    /// Where QEMU has mapped `memory`; `None` when it has not.
    ///
    /// Two mappings are an error: writes through one of them would not be seen.
    ///
    /// # Errors
    /// When the map cannot be read or parsed.
    pub fn find_mapping(&self, memory: &GuestMemory) -> Result<Option<u64>, TrackerError> {
        let inode = memory.inode()?;
        let maps = self.maps()?;
        let mut starts = maps
            .iter()
            .filter(|mapping| {
                let is_writable =
                    mapping.perms.contains(MMPermissions::SHARED | MMPermissions::WRITE);
                mapping.inode == inode && is_writable && mapping.offset == 0
            })
            .map(|mapping| mapping.address.0);
        let first = starts.next();
        match starts.next() {
            None => Ok(first),
            Some(second) => Err(TrackerError::TrackedBlock {
                block: memory.name().to_owned(),
                reason: format!(
                    "QEMU has mapped it twice, at {:#x} and {second:#x}",
                    first.unwrap_or(0)
                ),
            }),
        }
    }

    fn open<T>(
        &self,
        kind: FdKind,
        what: &'static str,
        remedy: &'static str,
        handle: Option<T>,
    ) -> Result<T, TrackerError> {
        handle.ok_or_else(|| TrackerError::MissingHandle {
            what,
            remedy,
            source: io::Error::from_raw_os_error(self.reply.errno[kind as usize]),
        })
    }
}

fn connect_until(path: &Path, deadline: Instant) -> Result<UnixStream, TrackerError> {
    loop {
        let error = match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(source) => TrackerError::Connect { path: path.to_owned(), source },
        };
        if !error.is_retryable() || Instant::now() >= deadline {
            return Err(error);
        }
        std::thread::sleep(CONNECT_PAUSE);
    }
}

/// Descriptors of another process would make the helper track that process. So only a QEMU of this
/// user is accepted, or of any user when the helper is root.
fn check_peer(path: &Path, stream: &UnixStream) -> Result<u32, TrackerError> {
    let not_ours = |what| TrackerError::NotThePlugin { path: path.to_owned(), what };
    let peer = getsockopt(stream, sockopt::PeerCredentials)
        .map_err(|_| not_ours("its owner cannot be determined"))?;
    let us = geteuid();
    if !us.is_root() && peer.uid() != us.as_raw() {
        return Err(not_ours("it belongs to another user"));
    }
    u32::try_from(peer.pid()).map_err(|_| not_ours("its process cannot be determined"))
}

fn greet(
    stream: &mut UnixStream,
    timeout: Duration,
) -> io::Result<([u8; REPLY_LEN], Vec<OwnedFd>)> {
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(&Hello { version: PROTOCOL_VERSION }.encode())?;
    let mut reply = [0; REPLY_LEN];
    let fds = receive(stream, &mut reply)?;
    Ok((reply, fds))
}
