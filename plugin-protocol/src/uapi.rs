//! The kernel's userfaultfd interface: the part that we use, as `linux/userfaultfd.h` defines it.
//!
//! Sizes are part of the ioctl numbers, so they are checked here.

/// `UFFD_API`
pub const API: u64 = 0xaa;

/// Fault messages carry the write-protect flag.
pub const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Missing pages of shared memory can be filled on demand (lazy restore).
pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Write protection works on shared memory and huge pages.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Pages that do not exist yet can be protected, so that their first write is seen.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// The kernel resolves write faults by itself and remembers them: the guest never waits for us
/// (Linux 6.7).
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// Everything that one uffd has to offer for tracking and for lazy restore.
pub const WANTED_FEATURES: u64 = FEATURE_PAGEFAULT_FLAG_WP
    | FEATURE_MISSING_SHMEM
    | FEATURE_WP_HUGETLBFS_SHMEM
    | FEATURE_WP_UNPOPULATED
    | FEATURE_WP_ASYNC;

/// Flag of the system call: faults of the kernel itself are not delivered, and no privilege is
/// needed.
pub const USER_MODE_ONLY: i32 = 1;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Api {
    /// [`API`].
    pub api: u64,
    /// Asked for; then those of this kernel.
    pub features: u64,
    /// The ioctls that this kernel has, as bits.
    pub ioctls: u64,
}

/// `UFFDIO_API`: `_IOWR(0xAA, 0x3F, struct uffdio_api)`
pub const IOCTL_API: libc::Ioctl = read_write(0x3f, size_of::<Api>());
/// `USERFAULTFD_IOC_NEW`: `_IO(0xAA, 0x00)`, on `/dev/userfaultfd`
pub const IOCTL_NEW: libc::Ioctl = 0xaa00;

/// `_IOWR(0xAA, number, size)`
pub const fn read_write(number: u64, size: usize) -> libc::Ioctl {
    ioctl(3, number, size)
}

/// `_IOR(0xAA, number, size)`
pub const fn read(number: u64, size: usize) -> libc::Ioctl {
    ioctl(2, number, size)
}

const fn ioctl(direction: u64, number: u64, size: usize) -> libc::Ioctl {
    (direction << 30 | (size as u64) << 16 | API << 8 | number) as libc::Ioctl
}

const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(IOCTL_API == 0xc018_aa3f as libc::Ioctl);
