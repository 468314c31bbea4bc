//! The one exchange between the tracker and the plugin, byte by byte.
//!
//! A client connects, sends a [`Hello`] and gets a [`Reply`] with the file descriptors attached;
//! then the plugin hangs up. Both messages have a fixed size that no later version may change, so
//! that any two versions can always read each other's greeting and say which of them is too old.
//! All numbers are little-endian.
//!
//! ```text
//! hello (16)   0 magic "STILLPT?"   8 version u32   12 reserved u32 (zero)
//! reply (64)   0 magic "STILLPT!"   8 version u32   12 status u32   16 pid u32   20 QEMU plugin API version u32
//!             24 uffd features u64  32 uffd source u32   36 errno per descriptor, 5 x i32
//!             56 mask of attached descriptors u32        60 reserved u32 (zero)
//! ```

/// The first bytes of a hello.
pub const HELLO_MAGIC: [u8; 8] = *b"STILLPT?";
/// The first bytes of a reply.
pub const REPLY_MAGIC: [u8; 8] = *b"STILLPT!";
/// The version of what follows the greeting.
pub const PROTOCOL_VERSION: u32 = 1;
/// Bytes of a hello, of every version.
pub const HELLO_LEN: usize = 16;
/// Bytes of a reply, of every version.
pub const REPLY_LEN: usize = 64;
/// How many kinds of descriptor there are; also the most that one reply carries.
pub const FD_KINDS: usize = 5;

/// What a descriptor in the reply is; the order is the order of attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdKind {
    /// The userfaultfd.
    Uffd = 0,
    /// `/proc/self/pagemap`.
    Pagemap = 1,
    /// `/proc/self/mem`.
    Memory = 2,
    /// `/proc/self/maps`.
    Maps = 3,
    /// The file of the guest's main memory.
    Ram = 4,
}

/// How the plugin got its userfaultfd; decides what it can be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UffdSource {
    /// There is none.
    None = 0,
    /// The system call, with all rights.
    Syscall = 1,
    /// `/dev/userfaultfd`, with all rights.
    Device = 2,
    /// The system call for an unprivileged process: good for tracking, not for filling pages on
    /// demand.
    UserModeOnly = 3,
}

impl UffdSource {
    fn from_wire(value: u32) -> Option<Self> {
        [Self::None, Self::Syscall, Self::Device, Self::UserModeOnly]
            .into_iter()
            .find(|source| *source as u32 == value)
    }
}

/// The plugin's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The descriptors are attached.
    Ok = 0,
    /// The client is not ours.
    BadMagic = 1,
    /// The client is of another version.
    UnsupportedVersion = 2,
}

impl Status {
    fn from_wire(value: u32) -> Option<Self> {
        [Self::Ok, Self::BadMagic, Self::UnsupportedVersion]
            .into_iter()
            .find(|status| *status as u32 == value)
    }
}

/// What a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The client's version.
    pub version: u32,
}

impl Hello {
    /// Its bytes.
    pub fn encode(self) -> [u8; HELLO_LEN] {
        let mut out = [0; HELLO_LEN];
        put(&mut out, 0, &HELLO_MAGIC);
        put(&mut out, 8, &self.version.to_le_bytes());
        out
    }

    /// The client's version, or why it gets none of our descriptors.
    ///
    /// # Errors
    /// The status of the refusal.
    pub fn parse(bytes: &[u8; HELLO_LEN]) -> Result<Self, Status> {
        if bytes[..8] != HELLO_MAGIC {
            return Err(Status::BadMagic);
        }
        match get_u32(bytes, 8) {
            PROTOCOL_VERSION => Ok(Self { version: PROTOCOL_VERSION }),
            _ => Err(Status::UnsupportedVersion),
        }
    }
}

/// What the plugin answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// The plugin's version.
    pub version: u32,
    /// Whether it gives descriptors.
    pub status: Status,
    /// QEMU's process ID.
    pub pid: u32,
    /// The version of QEMU's plugin interface.
    pub api_version: u32,
    /// The features of the attached uffd; without one, what the kernel would have offered.
    pub uffd_features: u64,
    /// How the plugin got its userfaultfd.
    pub uffd_source: UffdSource,
    /// Why a descriptor is absent, by [`FdKind`]; 0 when it is there or was not asked for.
    pub errno: [i32; FD_KINDS],
    /// Bit `n` is set when the descriptor of kind `n` is attached.
    pub fd_mask: u32,
}

impl Reply {
    /// A reply that says no, and nothing else.
    pub fn refusal(status: Status) -> Self {
        Self {
            version: PROTOCOL_VERSION,
            status,
            pid: 0,
            api_version: 0,
            uffd_features: 0,
            uffd_source: UffdSource::None,
            errno: [0; FD_KINDS],
            fd_mask: 0,
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; REPLY_LEN] {
        let mut out = [0; REPLY_LEN];
        put(&mut out, 0, &REPLY_MAGIC);
        put(&mut out, 8, &self.version.to_le_bytes());
        put(&mut out, 12, &(self.status as u32).to_le_bytes());
        put(&mut out, 16, &self.pid.to_le_bytes());
        put(&mut out, 20, &self.api_version.to_le_bytes());
        put(&mut out, 24, &self.uffd_features.to_le_bytes());
        put(&mut out, 32, &(self.uffd_source as u32).to_le_bytes());
        for (slot, errno) in self.errno.iter().enumerate() {
            put(&mut out, 36 + 4 * slot, &errno.to_le_bytes());
        }
        put(&mut out, 56, &self.fd_mask.to_le_bytes());
        out
    }

    /// `None` when the bytes are not a reply of any version that we know.
    pub fn parse(bytes: &[u8; REPLY_LEN]) -> Option<Self> {
        if bytes[..8] != REPLY_MAGIC {
            return None;
        }
        let mut errno = [0; FD_KINDS];
        for (slot, value) in errno.iter_mut().enumerate() {
            *value = get_u32(bytes, 36 + 4 * slot).cast_signed();
        }
        let features = u64::from(get_u32(bytes, 24)) | u64::from(get_u32(bytes, 28)) << 32;
        Some(Self {
            version: get_u32(bytes, 8),
            status: Status::from_wire(get_u32(bytes, 12))?,
            pid: get_u32(bytes, 16),
            api_version: get_u32(bytes, 20),
            uffd_features: features,
            uffd_source: UffdSource::from_wire(get_u32(bytes, 32))?,
            errno,
            fd_mask: get_u32(bytes, 56),
        })
    }

    /// Whether a descriptor of this kind is attached.
    pub fn has(&self, kind: FdKind) -> bool {
        self.fd_mask & (1 << kind as u32) != 0
    }
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod test {
    use super::*;

    /// Old peers must be able to read the greeting for ever: this test may gain lines, never change
    /// one.
    #[test]
    fn greeting_bytes_never_change() {
        assert_eq!(&Hello { version: 1 }.encode(), b"STILLPT?\x01\0\0\0\0\0\0\0");
        let reply = Reply {
            version: 1,
            status: Status::UnsupportedVersion,
            pid: 0x01020304,
            api_version: 2,
            uffd_features: 0x1122_3344_5566_7788,
            uffd_source: UffdSource::UserModeOnly,
            errno: [1, 0, 0, 0, -1],
            fd_mask: 0b1_1110,
        };
        let expected: [u8; REPLY_LEN] = *b"STILLPT!\x01\0\0\0\x02\0\0\0\x04\x03\x02\x01\x02\0\0\0\
            \x88\x77\x66\x55\x44\x33\x22\x11\x03\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff\xff\xff\xff\x1e\0\0\0\0\0\0\0";
        assert_eq!(reply.encode(), expected);
        assert_eq!(Reply::parse(&expected), Some(reply));
    }

    #[test]
    fn hello_is_refused_with_its_reason() {
        let mut bytes = Hello { version: 1 }.encode();
        assert_eq!(Hello::parse(&bytes), Ok(Hello { version: 1 }));
        bytes[8] = 9;
        assert_eq!(Hello::parse(&bytes), Err(Status::UnsupportedVersion));
        bytes[0] = b'X';
        assert_eq!(Hello::parse(&bytes), Err(Status::BadMagic));
    }

    #[test]
    fn unknown_status_or_source_is_not_a_reply() {
        let good = Reply::refusal(Status::BadMagic).encode();
        for at in [0, 12, 32] {
            let mut bad = good;
            bad[at] = 0x77;
            assert_eq!(Reply::parse(&bad), None, "byte {at}");
        }
        assert!(Reply::parse(&good).is_some());
    }
}
