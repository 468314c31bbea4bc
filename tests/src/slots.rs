//! How many VMs run at once: four, over all test threads and test programs of this user. A test
//! mostly waits for its guest to come to something, so that two VMs keep two processors busy for
//! less than half of the time.
//!
//! Each place is a locked file, so that it is free again however its holder ends.

use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

const PLACES: usize = 4;
const LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(crate) struct Slots {
    _held: Vec<Flock<File>>,
}

impl Slots {
    /// Waits until `count` VMs may start. All at once, behind a gate: two holders of one place each
    /// never wait for each other.
    pub(crate) fn take(count: usize) -> Self {
        assert!((1..=PLACES).contains(&count), "a test has at most {PLACES} VMs at once");
        let _gate = Flock::lock(open("gate"), FlockArg::LockExclusive).expect("a lock file");
        let mut held = Vec::new();
        loop {
            for number in 0..PLACES {
                if held.len() < count
                    && let Ok(lock) = Flock::lock(
                        open(&format!("place-{number}")),
                        FlockArg::LockExclusiveNonblock,
                    )
                {
                    held.push(lock);
                }
            }
            if held.len() == count {
                return Self { _held: held };
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// What the tests of this user share.
pub(crate) fn shared_directory() -> PathBuf {
    let path = std::env::temp_dir().join(format!("stillpoint-tests-{}", nix::unistd::geteuid()));
    std::fs::create_dir_all(&path).expect("a directory for locks");
    path
}

fn open(name: &str) -> File {
    let path = shared_directory().join(name);
    File::options().create(true).truncate(false).write(true).open(path).expect("a lock file")
}
