//! The journal: what a session changes in QEMU, on disk before it does, for the helper after a
//! killed one.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::StreamMode;
use crate::migration::MigrationError;
use crate::migration::settings::Settings;

const VERSION: u32 = 1;
/// A journal has about a KiB.
const MAX_JOURNAL: u64 = 64 << 10;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    version: u32,
    pub(super) mode: StreamMode,
    pub(super) settings: Settings,
}

/// The file, until [`Self::remove`]. A drop keeps the file: QEMU's settings must still be restored.
#[derive(Debug, Clone)]
pub(super) struct Journal {
    path: PathBuf,
    pub(super) entry: Entry,
}

impl Journal {
    /// Writes it whole or not at all. It need not survive a power cut, which QEMU does not survive
    /// either.
    pub(super) fn write(
        path: &Path,
        mode: StreamMode,
        settings: Settings,
    ) -> Result<Self, MigrationError> {
        let entry = Entry { version: VERSION, mode, settings };
        let text =
            serde_json::to_vec_pretty(&entry).map_err(|error| bad(path, error.to_string()))?;
        let part = path.with_extension("part");
        let written = File::create(&part).and_then(|mut file| file.write_all(&text));
        let written = written.and_then(|()| std::fs::rename(&part, path));
        written.map_err(|source| {
            let _ = std::fs::remove_file(&part);
            MigrationError::Journal { what: "write", path: path.into(), source }
        })?;
        Ok(Self { path: path.into(), entry })
    }

    /// `None` if there is none.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, MigrationError> {
        let error = |source| MigrationError::Journal { what: "read", path: path.into(), source };
        let file = match File::open(path) {
            Err(source) if source.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(error)?,
        };
        let mut text = Vec::new();
        file.take(MAX_JOURNAL + 1).read_to_end(&mut text).map_err(error)?;
        if text.len() as u64 > MAX_JOURNAL {
            return Err(bad(path, format!("it is larger than {MAX_JOURNAL} bytes")));
        }
        Ok(Some(Self { path: path.into(), entry: parse(&text).map_err(|why| bad(path, why))? }))
    }

    /// Where an NBD server of the session may listen.
    pub(super) fn socket(&self) -> PathBuf {
        self.path.with_extension("nbd")
    }

    pub(super) fn remove(&self) -> Result<(), MigrationError> {
        match std::fs::remove_file(&self.path) {
            Err(source) if source.kind() != ErrorKind::NotFound => {
                Err(MigrationError::Journal { what: "remove", path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

fn parse(text: &[u8]) -> Result<Entry, String> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let version =
        serde_json::from_slice::<Versioned>(text).map_err(|error| error.to_string())?.version;
    if version != VERSION {
        return Err(format!("its version is {version}, and this program knows {VERSION}"));
    }
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

fn bad(path: &Path, why: String) -> MigrationError {
    MigrationError::BadJournal { path: path.into(), why }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn it_is_read_as_written_and_only_if_sound() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("migration.json");
        assert!(Journal::read(&path).expect("none").is_none());
        let written =
            Journal::write(&path, StreamMode::PreCopy, Settings::default()).expect("write");
        assert_eq!(Journal::read(&path).expect("read").expect("there").entry, written.entry);
        assert_eq!(
            std::fs::read_dir(directory.path()).expect("list").count(),
            1,
            "a part stays behind"
        );
        let text = std::fs::read_to_string(&path).expect("text");
        let newer = text.replace("\"version\": 1", "\"version\": 2, \"new\": []");
        let large = format!("{text}{}", " ".repeat(64 << 10));
        for bad in [
            newer.as_str(),
            &large,
            "",
            "{}",
            "[1]",
            &text[..text.len() / 2],
            "{\"version\": 1, \"mode\": \"teleport\"}",
        ] {
            std::fs::write(&path, bad).expect("spoil");
            let error = Journal::read(&path).map(drop).expect_err("spoilt");
            assert!(
                matches!(error, MigrationError::BadJournal { .. })
                    && error.to_string().contains("migration.json"),
                "{error}"
            );
        }
        written.remove().expect("remove");
        written.remove().expect("again");
    }
}
