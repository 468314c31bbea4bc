//! Where QEMU finds the files that come with it, and that a bare name on its command line may mean
//! (`-bios bios-256k.bin`).

use super::spawn::ended_within;
use crate::cache;
use crate::process;
use anyhow::{Context, Result, bail};
use std::io::{Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// QEMU answers within 50 ms; a loaded host may need longer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// QEMU takes at most 16 directories.
const MAX_ANSWER_BYTES: u64 = 1 << 17;

/// A QEMU that runs.
#[derive(Clone, Copy, Debug)]
pub struct Running<'a> {
    pub program: &'a Path,
    pub pid: u32,
}

impl Running<'_> {
    /// The directories of its own files. Asked once per program, then kept in the cache directory.
    pub fn data_directories(self) -> Result<Vec<PathBuf>> {
        let facts = std::fs::metadata(self.program)
            .with_context(|| format!("looking at {}", self.program.display()))?;
        let identity = [facts.dev(), facts.ino(), facts.size(), facts.ctime().cast_unsigned()];
        let key = format!("{}-{identity:?}", self.program.display());
        if let Some(known) = cache::load("qemu-data", &key) {
            return Ok(known);
        }
        let found = self.ask().with_context(|| {
            format!("asking {} where its files are (-L help)", self.program.display())
        })?;
        cache::save("qemu-data", &key, &found);
        Ok(found)
    }

    fn ask(self) -> Result<Vec<PathBuf>> {
        let mut said = tempfile::tempfile().context("making a file for its answer")?;
        let mut command = Command::new(self.program);
        command.args(["-no-user-config", "-L", "help"]).stdin(Stdio::null()).stderr(Stdio::null());
        command.stdout(said.try_clone().context("opening the file for its answer twice")?);
        // The program may be that other user's own: it gets none of root's rights, and none of its
        // environment.
        if let Some((user, group)) =
            user(self.pid).filter(|(user, _)| nix::unistd::geteuid().is_root() && *user != 0)
        {
            command.env_clear().uid(user).gid(group);
        }
        let mut child = command.spawn().context("starting it")?;
        let Some(status) = ended_within(&mut child, TIMEOUT)? else {
            child.kill().context("ending it")?;
            child.wait().context("waiting for its end")?;
            bail!("it did not answer within {TIMEOUT:?}");
        };
        let mut text = String::new();
        said.rewind().context("reading its answer")?;
        said.take(MAX_ANSWER_BYTES).read_to_string(&mut text).context("reading its answer")?;
        if !status.success() {
            bail!("it ended ({status})");
        }
        directories(&text)
    }
}

fn directories(answer: &str) -> Result<Vec<PathBuf>> {
    let found: Vec<PathBuf> =
        answer.lines().map(PathBuf::from).filter(|path| path.is_absolute()).collect();
    if found.is_empty() {
        bail!("its answer names no directory: {:?}", answer.chars().take(200).collect::<String>());
    }
    Ok(found)
}

/// The effective user and group of a process. The owner of its folder in /proc may be root for
/// other reasons.
fn user(pid: u32) -> Option<(u32, u32)> {
    let status = process::open(pid).ok()?.status().ok()?;
    Some((status.euid, status.egid))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn data_directories_are_the_paths_of_the_answer() {
        assert_eq!(
            directories("/a\nwarning\n/b c\n").unwrap(),
            [PathBuf::from("/a"), "/b c".into()]
        );
        for answer in ["", "share/qemu\n"] {
            directories(answer).unwrap_err();
        }
    }

    #[test]
    fn user_of_a_process_is_its_effective_one() {
        let ids = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        assert_eq!(user(std::process::id()), Some(ids));
        assert_eq!(user(0), None);
    }
}
