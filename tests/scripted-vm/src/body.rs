//! The process that has the VM's memory, with the plugin in it.

use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::ram::PAGE;
use crate::{Ram, RamPart};

/// The plugin and the program that loads it as QEMU does, as cargo builds them.
struct Built {
    plugin: PathBuf,
    program: PathBuf,
}

/// Once per test program; when they are up to date this takes a tenth of a second.
fn built() -> &'static Built {
    static BUILT: OnceLock<Built> = OnceLock::new();
    BUILT.get_or_init(|| {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| env!("CARGO").to_owned());
        let manifest =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../dirty-tracker/plugin/Cargo.toml");
        let mut command = Command::new(cargo);
        command.args(["build", "--lib", "--example", "stand-in", "--message-format=json"]);
        command.args(["--manifest-path", manifest]);
        if !cfg!(debug_assertions) {
            command.arg("--release");
        }
        let output = command.stderr(Stdio::inherit()).output().expect("cargo can be run");
        assert!(output.status.success(), "the plugin does not build");
        let text = String::from_utf8(output.stdout).expect("cargo speaks UTF-8");
        let messages = text.lines().filter_map(|line| serde_json::from_str(line).ok());
        let paths: Vec<PathBuf> = messages
            .flat_map(|message: serde_json::Value| {
                let files = message["filenames"].as_array().cloned().unwrap_or_default();
                files.into_iter().filter_map(|path| path.as_str().map(PathBuf::from))
            })
            .collect();
        let find = |wanted: &dyn Fn(&Path) -> bool| {
            paths.iter().find(|path| wanted(path)).expect("cargo reports what it has built").clone()
        };
        Built {
            plugin: find(&|path| path.extension().is_some_and(|extension| extension == "so")),
            program: find(&|path| path.file_name().is_some_and(|name| name == "stand-in")),
        }
    })
}

/// The program that loads the plugin as QEMU does.
pub(crate) fn stand_in() -> &'static Path {
    &built().program
}

/// Inheriting a descriptor is a matter of the whole process: one start at a time.
static STARTING: Mutex<()> = Mutex::new(());

/// Of `vga.vram`, in a QEMU that is started by its program.
const VIDEO_PAGES: usize = 16;

/// A process with the plugin in it and two blocks of memory: `pc.ram`, a file that it shares, and
/// `vga.vram`, its own. Killed on drop.
pub struct Body {
    /// None if another process started it.
    child: Option<Child>,
    pid: u32,
    process: Arc<OwnedFd>,
    input: File,
    output: Lines<BufReader<File>>,
    memory: File,
    shared: u64,
    private: u64,
    pages: (usize, usize),
}

impl Body {
    /// Starts it in `directory`. The plugin listens at `socket`; `disks` are open in it.
    pub fn start(directory: &Path, socket: &Path, pages: (usize, usize), disks: &[File]) -> Self {
        let Built { plugin, program } = built();
        let memory = File::from(
            memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .expect("a memory file"),
        );
        memory.set_len((pages.0 * PAGE) as u64).expect("memory");
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .expect("ours");
        let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: Vec<_> = disks.iter().chain([&memory]).map(AsFd::as_fd).collect();
        let inherit = |flags| kept.iter().for_each(|fd| fcntl_setfd(fd, flags).expect("ours"));
        inherit(FdFlags::empty());
        let mut child = Command::new(program)
            .args([plugin.as_path(), socket])
            .args([memory.as_raw_fd().to_string(), pages.0.to_string(), pages.1.to_string()])
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        inherit(FdFlags::CLOEXEC);
        let input = File::from(OwnedFd::from(child.stdin.take().expect("piped")));
        let output = File::from(OwnedFd::from(child.stdout.take().expect("piped")));
        let pipes = (input, BufReader::new(output).lines());
        let mut body = Self::ready(child.id(), pipes, memory, pages).expect("it answers");
        body.child = Some(child);
        body
    }

    /// One that another process has started, when it is ready; none if it ends before.
    pub(crate) fn of_program(
        pid: u32,
        pipes: (File, Lines<BufReader<File>>),
        memory: File,
        pages: usize,
    ) -> Option<Self> {
        Self::ready(pid, pipes, memory, (pages, VIDEO_PAGES))
    }

    fn ready(
        pid: u32,
        (input, mut output): (File, Lines<BufReader<File>>),
        memory: File,
        pages: (usize, usize),
    ) -> Option<Self> {
        let number = Pid::from_raw(pid.cast_signed()).expect("a process");
        let process = Arc::new(pidfd_open(number, PidfdFlags::empty()).ok()?);
        let ready = output.next()?.ok()?;
        let addresses = ready.strip_prefix("ready ").unwrap_or_else(|| panic!("{ready}"));
        let (shared, private) = addresses.split_once(' ').expect("two addresses");
        let address = |text| u64::from_str_radix(text, 16).expect("hexadecimal");
        let (shared, private) = (address(shared), address(private));
        Some(Self { child: None, pid, process, input, output, memory, shared, private, pages })
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its process, whatever becomes of its number.
    pub(crate) fn process(&self) -> &Arc<OwnedFd> {
        &self.process
    }

    /// The memory, for the scripted QEMU.
    pub fn ram(&self) -> Ram {
        let process = format!("/proc/{}/mem", self.pid());
        let process = File::options().read(true).write(true).open(process).expect("our child");
        let part = |name: &str, pages: usize, host, file, offset| RamPart {
            name: name.to_owned(),
            bytes: (pages * PAGE) as u64,
            host,
            file,
            offset,
        };
        let memory = self.memory.try_clone().expect("a descriptor");
        Ram {
            parts: vec![
                part("pc.ram", self.pages.0, self.shared, memory, 0),
                part("vga.vram", self.pages.1, self.private, process, self.private),
            ],
        }
    }

    /// The guest writes one byte in each of these pages of `pc.ram`.
    pub fn write(&mut self, pages: &[usize]) {
        let numbers: Vec<String> = pages.iter().map(usize::to_string).collect();
        writeln!(self.input, "w s {}", numbers.join(" ")).expect("it listens");
        assert_eq!(self.output.next().expect("it answers").expect("text"), "ok");
    }

    /// QEMU is killed.
    pub fn kill(&mut self) {
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        if let Some(child) = &mut self.child {
            child.wait().expect("ours");
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.kill();
    }
}
