//! What QEMU does in some releases only, each with its reason. Every comparison of versions is an
//! entry here.
//!
//! What a QEMU can tell itself is asked instead, whatever its release: capabilities and commands by
//! their names, `blockdev-set-active` (10.0) by `query-commands`, whether the state of a `ramfb` is
//! saved (8.2) by its property `x-migrate`, the address of a RAM block (8.2) by `info ramblock`,
//! the options of a `copy-before-write` filter (7.1) by adding one.

use std::fmt;

/// Before it, QEMU clears the dirty bits that it has read in a live migration, but not the belief
/// of TCG's translation cache that the page is dirty, so later writes go unseen (seen with 7.2: one
/// restored guest in two to four had a page of an earlier instant; 10.0: none; KVM marks pages in
/// another way).
pub const LIVE_TCG_MIGRATION_LOSES_PAGES: Quirk = Quirk::before(9, 0);
/// Before it, QEMU continues write-protecting memory after a background snapshot that was cancelled
/// or whose reader is gone: the guest's processors then wait in a page fault for ever (seen with
/// 7.2). A guest must not depend on us so. Nor does it keep the run state: any guest runs after a
/// snapshot.
pub const SNAPSHOT_WITHOUT_READER_HANGS: Quirk = Quirk::before(9, 0);
/// Before it, `stop` leaves the clock and the devices of a suspended guest running. Since then
/// `cont` and a restore bring it back to that state.
pub const SUSPENDED_GUEST_CANNOT_BE_STOPPED: Quirk = Quirk::before(9, 0);
/// Before it, QEMU's NBD server ends a connection in the thread of the disk. Debian's 7.2.22
/// asserts there that this is the main thread and aborts, guest and all, as soon as a client of a
/// disk in an iothread hangs up (seen).
pub const NBD_SERVER_ABORTS_IN_IOTHREAD: Quirk = Quirk::before(9, 0);
/// Before it, QEMU saves several devices of a kind without a bus path under one name, and several
/// user networks too, and loads all of them into the first. Since then it numbers them.
pub const EQUAL_DEVICES_SAVED_AS_ONE: Quirk = Quirk::before(8, 2);
/// Since it, `migrate-incoming` has `exit-on-error`: QEMU can report a failed load instead of
/// ending.
pub const REPORTS_FAILED_LOAD: Quirk = Quirk::since(9, 1);
/// Since it, QEMU has monitors as objects, and warns of `-mon`.
pub const MONITORS_ARE_OBJECTS: Quirk = Quirk::since(11, 1);
/// Of machine types: those before it leave the configuration, the sections' footers and the run
/// state out of their stream (`hw_compat_2_3`).
pub const MACHINE_TYPE_HAS_SHORT_STREAM: Quirk = Quirk::before(2, 4);

/// The two numbers of a version by which QEMU changes what it does; the third is of repairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
}

impl Release {
    /// Of a version such as `10.0.2`; none of another text.
    pub fn parse(version: &str) -> Option<Self> {
        let mut numbers = version.split('.').map(str::parse);
        Some(Self { major: numbers.next()?.ok()?, minor: numbers.next()?.ok()? })
    }

    /// Of a machine type with a version in its name, such as `pc-i440fx-2.3`.
    pub fn of_machine_type(name: &str) -> Option<Self> {
        Self::parse(name.rsplit('-').next()?)
    }

    /// Whether a QEMU of this release does that.
    pub fn has(self, quirk: Quirk) -> bool {
        match quirk {
            Quirk::Before(first_without) => self < first_without,
            Quirk::Since(first) => self >= first,
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The releases that do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quirk {
    /// All older ones.
    Before(Release),
    /// It and all newer ones.
    Since(Release),
}

impl Quirk {
    const fn before(major: u32, minor: u32) -> Self {
        Self::Before(Release { major, minor })
    }

    const fn since(major: u32, minor: u32) -> Self {
        Self::Since(Release { major, minor })
    }

    /// The release in which it changed, for messages.
    pub fn changed_in(self) -> Release {
        match self {
            Self::Before(release) | Self::Since(release) => release,
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn release_is_read_from_versions_and_machine_types() {
        let release = |major, minor| Some(Release { major, minor });
        assert_eq!(Release::parse("10.0.2"), release(10, 0));
        assert_eq!((Release::parse("?"), Release::parse("10")), (None, None));
        assert_eq!(Release::of_machine_type("pc-q35-10.0"), release(10, 0));
        assert_eq!(Release::of_machine_type("isapc"), None);
        assert_eq!(Release::of_machine_type("microvm"), None);
        assert!(Release::parse("7.2.22") < release(10, 0), "they compare as numbers");
        assert!(Release::parse("10.0.2") >= release(10, 0));
        assert!(Release::parse("nonsense") < release(7, 2));
    }

    #[test]
    fn quirk_ends_or_begins_with_its_release() {
        let has = |version, quirk| Release::parse(version).expect(version).has(quirk);
        assert!(has("8.2.9", LIVE_TCG_MIGRATION_LOSES_PAGES));
        assert!(!has("9.0.0", LIVE_TCG_MIGRATION_LOSES_PAGES));
        assert!(!has("9.0.4", REPORTS_FAILED_LOAD) && has("9.1.0", REPORTS_FAILED_LOAD));
        assert!(has("2.3", MACHINE_TYPE_HAS_SHORT_STREAM));
        assert_eq!(LIVE_TCG_MIGRATION_LOSES_PAGES.changed_in().to_string(), "9.0");
    }
}
