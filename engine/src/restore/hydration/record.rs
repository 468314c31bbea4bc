//! What the runtime directory says of a hydration, so that the next helper continues it.

use anyhow::{Context, Result};
use checkpoint_format::{CheckpointIdentity, VmName};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vm::runtime_dir::RuntimeDir;

const FILE: &str = "hydration.json";
const MAX_BYTES: u64 = 64 << 10;

/// Where the missing pages come from, and where they go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The QEMU that waits: another one of this name has all its memory, or a record of its own.
    pub instance: String,
    /// The store's URL.
    pub store: String,
    /// The VM whose checkpoint it is; a copy has another name.
    pub vm: VmName,
    /// The checkpoint: another of the same ID is another.
    pub checkpoint: CheckpointIdentity,
    /// The RAM block.
    pub block: String,
    /// Where QEMU has mapped it.
    pub host_address: u64,
    /// Its size.
    pub bytes: u64,
    /// Bytes of all pages that are not zero.
    pub total_bytes: u64,
    /// If a thread of QEMU waits for a page so long, the guest is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Duration>,
}

impl Record {
    /// Before a thread can wait for a page.
    pub(super) fn save(&self, runtime: &RuntimeDir) -> Result<()> {
        let text = serde_json::to_vec(self).context("internal error: encoding hydration.json")?;
        Ok(runtime.replace(FILE, &text)?)
    }

    /// That of a hydration of the VM's QEMU that has not ended; `instance` asks which QEMU it is.
    pub(super) fn load(
        runtime: &RuntimeDir,
        instance: impl FnOnce() -> Result<String>,
    ) -> Result<Option<Self>> {
        if !runtime.path().join(FILE).exists() {
            return Ok(None);
        }
        let text = runtime.read(FILE, MAX_BYTES)?;
        let record: Self = serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is damaged: where the rest of the guest's memory is cannot be known; restore \
                 the VM again",
                runtime.path().join(FILE).display()
            )
        })?;
        if record.instance == instance()? {
            return Ok(Some(record));
        }
        tracing::info!("an earlier QEMU of this name ended before all its memory had arrived");
        Self::remove(runtime)?;
        Ok(None)
    }

    /// No thread waits for a page any more.
    pub(super) fn remove(runtime: &RuntimeDir) -> Result<()> {
        Ok(runtime.forget(FILE)?)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use checkpoint_format::CheckpointId;

    #[test]
    fn hydration_record_is_of_one_qemu_only() {
        let place = tempfile::tempdir().unwrap();
        let runtime =
            RuntimeDir::new(Some(&place.path().join("run")), &"m".parse().unwrap()).unwrap();
        runtime.create().unwrap();
        let load = |instance: &str| Record::load(&runtime, || Ok(instance.to_owned()));
        assert_eq!(load("one").unwrap(), None);
        let record = Record {
            instance: "one".into(),
            store: "file:///s".into(),
            vm: "m".parse().unwrap(),
            checkpoint: CheckpointIdentity::new(CheckpointId(7), b"manifest"),
            block: "pc.ram".into(),
            host_address: 1 << 40,
            bytes: 1 << 30,
            total_bytes: 1 << 29,
            deadline: Some(Duration::from_secs(3)),
        };
        record.save(&runtime).unwrap();
        assert_eq!(load("one").unwrap(), Some(record.clone()));
        // As an earlier version wrote it.
        let earlier = Record { deadline: None, ..record.clone() };
        earlier.save(&runtime).unwrap();
        let text = runtime.read(FILE, MAX_BYTES).unwrap();
        assert!(!String::from_utf8(text).unwrap().contains("deadline"));
        assert_eq!(load("one").unwrap(), Some(earlier));
        assert_eq!(load("another").unwrap(), None);
        assert_eq!(load("one").unwrap(), None, "it was removed");
        runtime.replace(FILE, b"{").unwrap();
        assert!(load("one").is_err());
    }
}
