//! QEMU as a program that the library under test starts, for a restore or an adoption.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::body::{Body, stand_in};
use crate::{ScriptedQemu, Version};

/// Where the program finds its test: in the directory of the runtime directories' base, `qemu/`.
pub struct Program {
    directory: PathBuf,
}

/// A QEMU that the library under test has started. Killed on drop.
pub struct Started {
    /// Its command line, without the program.
    pub words: Vec<String>,
    /// Its monitor, with the state to be loaded and no disk yet.
    pub qemu: ScriptedQemu,
    /// Its process.
    pub body: Body,
}

impl Program {
    /// `base`: of the runtime directories.
    pub fn new(base: &Path) -> Self {
        let directory = base.parent().expect("a base has one").join("qemu");
        std::fs::create_dir_all(&directory).expect("the test's directory");
        symlink(stand_in(), directory.join("stand-in")).expect("a link");
        let program = Self { directory };
        program.make_pipes();
        program
    }

    fn make_pipes(&self) {
        for pipe in ["in", "out"].map(|name| self.directory.join(name)) {
            let _ = std::fs::remove_file(&pipe);
            mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
        }
    }

    /// To be named where a QEMU is. It is one file for all tests, since what it is gets cached.
    pub fn path() -> PathBuf {
        concat!(env!("CARGO_MANIFEST_DIR"), "/src/qemu.sh").into()
    }

    /// The next one that is started says this and ends at once.
    pub fn refuse(&self, words: &str) {
        std::fs::write(self.directory.join("refusal"), words).expect("the test's directory");
    }

    /// Waits until one is started, and plays it. `prepare` adds its disks and what shall happen,
    /// before it listens at the sockets that its command line names. None if it refused.
    pub fn play(
        &self,
        version: Version,
        prepare: impl FnOnce(&ScriptedQemu, &[String]),
    ) -> Option<Started> {
        let input = File::options().write(true).open(self.directory.join("in"));
        let input = input.expect("the program opens it");
        let output = File::open(self.directory.join("out")).expect("the program opens it");
        // These are of this process now.
        self.make_pipes();
        let mut lines = BufReader::new(output).lines();
        let mut line = || lines.next().transpose().expect("text");
        let numbers = line().expect("the program tells");
        let numbers: Vec<u32> = numbers.split(' ').flat_map(str::parse).collect();
        let [pid, ram, pages, count] = numbers[..] else { panic!("{numbers:?}") };
        let words: Vec<String> = (0..count).filter_map(|_| line()).collect();
        let memory = format!("/proc/{pid}/fd/{ram}");
        let memory = File::options().read(true).write(true).open(memory).ok()?;
        let body = Body::of_program(pid, (input, lines), memory, pages as usize)?;
        let qemu = ScriptedQemu::new(version, body.ram());
        qemu.runs_in(&body);
        qemu.with(|state| state.run_state = "inmigrate".into());
        prepare(&qemu, &words);
        qemu.with(|state| state.blocks.is_active = false);
        words.iter().filter_map(|word| socket(word)).for_each(|path| {
            qemu.listen(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        });
        end_with(Arc::clone(body.process()), qemu.clone());
        Some(Started { words, qemu, body })
    }
}

impl Started {
    /// Its process is killed: when this returns, no client of its is served.
    pub fn kill(&mut self) {
        self.body.kill();
        self.qemu.end();
    }
}

/// Of a monitor.
fn socket(word: &str) -> Option<PathBuf> {
    let keys = word.strip_prefix("socket,").or_else(|| word.strip_prefix("unix:"))?;
    let path = match keys.split_once("path=") {
        Some((_, path)) => path,
        None => keys,
    };
    Some(path.split(',').next()?.into())
}

/// The connections of a process end with it.
fn end_with(process: Arc<OwnedFd>, qemu: ScriptedQemu) {
    std::thread::spawn(move || {
        let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], None);
        qemu.end();
    });
}
