//! What can go wrong between the tracker, the plugin and the kernel.

use std::io;
use std::path::PathBuf;

use checkpoint_format::PageRange;

/// Each says what was tried, on what, and what to do next.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum TrackerError {
    #[error(
        "cannot reach the plugin at {}; start QEMU with -plugin file=libstillpoint_plugin.so,socket={}, as the same user",
        path.display(), path.display()
    )]
    Connect { path: PathBuf, source: io::Error },

    #[error("the greeting with the plugin at {} broke off; try again, and look at QEMU's log if it persists", path.display())]
    Greeting { path: PathBuf, source: io::Error },

    #[error("what listens at {} is not our plugin: {what}; check the socket= path", path.display())]
    NotThePlugin { path: PathBuf, what: &'static str },

    #[error(
        "the plugin at {} speaks protocol {plugin}, this program {ours}; restart QEMU with the plugin of this version",
        path.display()
    )]
    Version { path: PathBuf, plugin: u32, ours: u32 },

    #[error("QEMU could not open its {what} for tracking; {remedy}")]
    MissingHandle { what: &'static str, remedy: &'static str, source: io::Error },

    #[error("RAM block '{block}' cannot be tracked: {reason}")]
    TrackedBlock { block: String, reason: String },

    #[error("cannot read QEMU's memory map; is the process still there?")]
    Maps { source: io::Error },

    #[error(
        "QEMU's memory map has a line that cannot be parsed: {error}; please report it with the kernel version"
    )]
    MapsForm { error: String },

    #[error(
        "cannot register RAM block '{block}' for write tracking; if QEMU's background-snapshot capability is on, switch it off"
    )]
    Register { block: String, source: io::Error },

    #[error("cannot write-protect RAM block '{block}'; take the next checkpoint as a full one")]
    Protect { block: String, source: io::Error },

    #[error(
        "cannot scan RAM block '{block}' for written pages; take the next checkpoint as a full one"
    )]
    Scan { block: String, source: io::Error },

    #[error(
        "cannot watch RAM block '{block}' for pages that a balloon discards; start the VM without a balloon or without huge page \
         memory, or use --engine stream"
    )]
    Holes { block: String, source: io::Error },

    #[error(
        "cannot read pages {pages} of RAM block '{block}' from QEMU; is the process still there?"
    )]
    Read { block: String, pages: PageRange, source: io::Error },

    #[error("cannot fill missing pages of RAM block '{block}'; is the host out of memory?")]
    Fill { block: String, source: io::Error },

    #[error(
        "the memory of RAM block '{block}' is still arriving, so not all of it can be read; wait \
         until it is here"
    )]
    Arriving { block: String },

    #[error("no RAM block number {0} is attached; use the numbers of this tracker")]
    UnknownBlock(usize),

    #[error("the claim belongs to another tracker; begin one with the tracker that fills it")]
    ForeignClaim,

    #[error("cannot {what} guest memory '{name}'; {remedy}")]
    Memory { name: String, what: &'static str, remedy: &'static str, source: io::Error },

    #[error("bytes {start}..{end} are outside guest memory '{name}' of {len} bytes")]
    OutOfRange { name: String, start: u64, end: u64, len: u64 },
}

error_class::classes! {
    TrackerError: Refused(NotThePlugin, Version, MissingHandle, TrackedBlock, Arriving)
        Failed(Connect, Greeting, Maps, MapsForm, Register, Protect, Scan, Holes, Read, Fill,
            UnknownBlock, ForeignClaim, Memory, OutOfRange);
}

impl TrackerError {
    /// Whether the same call may succeed a little later, with nothing changed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connect { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::WouldBlock
                    | io::ErrorKind::TimedOut
            ),
            Self::Greeting { .. } => true,
            _ => false,
        }
    }

    /// Whether the process that was tracked has ended.
    pub fn is_process_gone(&self) -> bool {
        match self {
            Self::Register { source, .. }
            | Self::Protect { source, .. }
            | Self::Scan { source, .. }
            | Self::Fill { source, .. }
            | Self::Maps { source } => source.raw_os_error() == Some(libc::ESRCH),
            _ => false,
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn error(kind: io::ErrorKind) -> io::Error {
        kind.into()
    }

    fn gone() -> io::Error {
        io::Error::from_raw_os_error(libc::ESRCH)
    }

    #[test]
    fn only_what_time_can_cure_is_retryable() {
        let connect = |kind| TrackerError::Connect { path: "s".into(), source: error(kind) };
        assert!(connect(io::ErrorKind::NotFound).is_retryable());
        assert!(connect(io::ErrorKind::ConnectionRefused).is_retryable());
        assert!(!connect(io::ErrorKind::PermissionDenied).is_retryable());
        assert!(!TrackerError::ForeignClaim.is_retryable());
    }

    #[test]
    fn ended_process_is_distinguished_from_other_failures() {
        let scan = |source| TrackerError::Scan { block: "pc.ram".into(), source };
        assert!(scan(gone()).is_process_gone());
        assert!(!scan(error(io::ErrorKind::PermissionDenied)).is_process_gone());
        assert!(!TrackerError::ForeignClaim.is_process_gone());
    }

    #[test]
    fn texts_are_distinct_and_name_the_block() {
        let block = || "vga.vram".to_owned();
        let texts = [
            TrackerError::Register { block: block(), source: gone() }.to_string(),
            TrackerError::Protect { block: block(), source: gone() }.to_string(),
            TrackerError::Scan { block: block(), source: gone() }.to_string(),
        ];
        assert!(texts.iter().all(|text| text.contains("'vga.vram'")), "{texts:?}");
        assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2]);
    }
}
