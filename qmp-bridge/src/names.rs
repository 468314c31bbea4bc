//! The names of what we put into a QEMU: nodes, jobs, exports, QOM objects, file descriptors.
//!
//! QEMU has no owners: a name is all by which a later helper tells what an earlier one made from
//! what the owner of the VM or another tool did. So each name carries a digest of the VM's instance
//! (`sp-91b04c2f6e-…`), which the next helper of that instance derives again, and only what bears
//! it is ever removed.

use std::fmt::Write;

const PREFIX: &str = "sp-";
/// Of what stays for as long as a disk's blocks arrive, and is not removed with the rest.
const ARRIVING: &str = "sa-";
/// Of 31 bytes that a node's name may have.
const DIGEST_LETTERS: usize = 10;

/// Names for one instance of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ObjectNames {
    prefix: String,
}

impl ObjectNames {
    pub(crate) fn of(instance: &str) -> Self {
        let mut prefix = String::from(PREFIX);
        // Writing to a string cannot fail.
        let _ = write!(prefix, "{:016x}", fnv1a(instance.as_bytes()));
        prefix.truncate(PREFIX.len() + DIGEST_LETTERS);
        prefix.push('-');
        Self { prefix }
    }

    /// The name of the one object of this kind.
    pub(crate) fn name(&self, kind: &str) -> String {
        format!("{}{kind}", self.prefix)
    }

    /// The name of one of the nodes and jobs by which a disk's blocks arrive.
    pub(crate) fn arriving(&self, kind: &str) -> String {
        format!("{ARRIVING}{}{kind}", &self.prefix[PREFIX.len()..])
    }

    /// Whether [`Self::arriving`] made this name.
    pub(crate) fn is_arriving(&self, name: &str) -> bool {
        let rest = name.strip_prefix(ARRIVING);
        rest.is_some_and(|rest| rest.starts_with(&self.prefix[PREFIX.len()..]))
    }

    /// Whether something with this name was made by a helper of this instance.
    pub(crate) fn owns(&self, name: &str) -> bool {
        name.starts_with(&self.prefix)
    }
}

/// FNV-1a, 64 bits: the same in every build, which is all that is asked of it.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn object_names_belong_to_their_instance() {
        let (ours, theirs) = (ObjectNames::of("process-1-2-aa"), ObjectNames::of("process-1-2-ab"));
        let name = ours.name("paused");
        assert!(ours.owns(&name) && !theirs.owns(&name));
        assert_eq!(ours, ObjectNames::of("process-1-2-aa"));
        assert_eq!(name.len(), PREFIX.len() + DIGEST_LETTERS + "-paused".len());
        let arriving = ours.arriving("node-12");
        assert!(ours.is_arriving(&arriving) && !theirs.is_arriving(&arriving));
        assert!(!ours.owns(&arriving) && !ours.is_arriving(&name) && arriving.len() <= 31);
        for other in ["sp-data", "stillpoint-tgt", "sp-", ""] {
            assert!(!ours.owns(other), "{other}");
        }
    }
}
