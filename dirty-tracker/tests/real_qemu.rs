//! The plugin in real QEMUs, with a guest that writes the pages that the test names.
//!
//! Which QEMUs: `STILLPOINT_TEST_QEMUS`, colon-separated; else the two that `scripts/install-deps`
//! provides.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dirty_tracker::{BlockId, BlockMemory, GuestMemory, PluginHandles, TrackedBlock, Tracker};
use support::{PAGE, TIMEOUT, acknowledge, built, checkpoint, numbers};
use tempfile::TempDir;

const DEFAULT_QEMUS: [&str; 2] =
    ["/usr/bin/qemu-system-x86_64", "/opt/stillpoint/qemu-10.0/usr/bin/qemu-system-x86_64"];
const RAM: u64 = 64 << 20;

/// Where the guest's pages begin: page 0x20 (128 KiB), clear of the BIOS's own memory.
const FIRST_PAGE: u64 = 0x20;
/// Pages up to 0x80 (512 KiB) are free in conventional memory.
const GUEST_PAGES: u8 = 0x60;
/// The byte that the guest only echoes.
const PING: u8 = 0xff;

/// A boot sector that obeys bytes from the first serial port: `n` below [`GUEST_PAGES`] increments
/// a word in page `FIRST_PAGE + n`; every byte is echoed afterwards. It stays in real mode, where
/// KVM runs it on any host, keeps interrupts off and uses no stack, so that nothing else is written
/// while it waits.
#[rustfmt::skip]
const BOOT_CODE: [u8; 41] = [
    0xfa,                   // 00        cli
    0xba, 0xfd, 0x03,       // 01  wait: mov    $0x3fd, %dx      line status
    0xec,                   // 04        in     (%dx), %al
    0xa8, 0x01,             // 05        test   $1, %al          is a byte there?
    0x74, 0xf8,             // 07        jz     wait
    0xba, 0xf8, 0x03,       // 09        mov    $0x3f8, %dx      data
    0xec,                   // 0c        in     (%dx), %al
    0x88, 0xc3,             // 0d        mov    %al, %bl
    0x3c, GUEST_PAGES,      // 0f        cmp    $GUEST_PAGES, %al
    0x73, 0x0e,             // 11        jae    echo
    0x88, 0xc4,             // 13        mov    %al, %ah         segment = n * 0x100 + 0x2000
    0x30, 0xc0,             // 15        xor    %al, %al
    0x05, 0x00, 0x20,       // 17        add    $0x2000, %ax
    0x8e, 0xc0,             // 1a        mov    %ax, %es
    0x31, 0xff,             // 1c        xor    %di, %di
    0x26, 0xff, 0x05,       // 1e        incw   %es:(%di)
    0x88, 0xd8,             // 21  echo: mov    %bl, %al
    0xba, 0xf8, 0x03,       // 23        mov    $0x3f8, %dx
    0xee,                   // 26        out    %al, (%dx)
    0xeb, 0xd8,             // 27        jmp    wait
];

fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..BOOT_CODE.len()].copy_from_slice(&BOOT_CODE);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn qemus() -> Vec<PathBuf> {
    let chosen = match std::env::var("STILLPOINT_TEST_QEMUS") {
        Ok(list) => list.split(':').map(PathBuf::from).collect(),
        Err(_) => DEFAULT_QEMUS.map(PathBuf::from).to_vec(),
    };
    for qemu in &chosen {
        assert!(
            qemu.is_file(),
            "{} is missing: run scripts/install-deps, or set STILLPOINT_TEST_QEMUS",
            qemu.display()
        );
    }
    chosen
}

/// TCG always; KVM where it can be used.
fn accelerators() -> Vec<&'static str> {
    let kvm = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &kvm {
        eprintln!("not tested under KVM: /dev/kvm: {error}");
    }
    if kvm.is_ok() { vec!["tcg", "kvm"] } else { vec!["tcg"] }
}

/// A QEMU with the plugin and the guest. Killed on drop.
struct Vm {
    memory: GuestMemory,
    handles: PluginHandles,
    serial: UnixStream,
    process: Process,
    _dir: TempDir,
}

enum Process {
    Ours(Child),
    /// It went its own way; known by the number that it wrote down.
    Daemon(u32),
}

impl Vm {
    fn start(qemu: &Path, accelerator: &str, daemonize: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("boot.img"), boot_sector()).unwrap();
        let memory = GuestMemory::create("pc.ram", RAM).unwrap();
        let fd = memory.raw_fd();
        let mut command = Command::new(qemu);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-accel",
            accelerator,
            "-m",
            "64",
        ]);
        command.args(["-machine", "pc,memory-backend=pc.ram,hpet=off", "-vga", "std"]);
        command.arg("-object").arg(format!(
            "memory-backend-file,id=pc.ram,size={RAM},share=on,mem-path=/proc/self/fd/{fd}"
        ));
        command.arg("-plugin").arg(format!(
            "file={},socket={},ramfd={fd}",
            built().plugin.display(),
            path("plugin.sock").display()
        ));
        command
            .arg("-drive")
            .arg(format!("file={},format=raw,if=ide,snapshot=on", path("boot.img").display()));
        command
            .arg("-serial")
            .arg(format!("unix:{},server=on,wait=off", path("serial.sock").display()));
        command.arg("-pidfile").arg(path("pid"));
        if daemonize {
            command.arg("-daemonize");
        }
        let process = start(&mut command, &memory, daemonize, &path("pid"));
        let handles =
            PluginHandles::connect(&path("plugin.sock"), TIMEOUT).expect("the plugin answers");
        let serial = connect(&path("serial.sock"));
        let mut vm = Self { memory, handles, serial, process, _dir: dir };
        vm.wait_for_guest();
        vm
    }

    fn pid(&self) -> u32 {
        match &self.process {
            Process::Ours(child) => child.id(),
            Process::Daemon(pid) => *pid,
        }
    }

    /// The BIOS takes its time, and drops what comes before.
    fn wait_for_guest(&mut self) {
        let deadline = Instant::now() + 3 * TIMEOUT;
        self.serial.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let mut byte = [0];
        let mut sent = 0;
        while Instant::now() < deadline {
            self.serial.write_all(&[PING]).unwrap();
            sent += 1;
            if self.serial.read(&mut byte).is_ok_and(|length| length == 1) {
                break;
            }
        }
        assert_eq!(byte, [PING], "the guest does not answer");
        // Swallow the echoes of the pings that waited; there may be fewer than were sent.
        self.serial.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        while sent > 1 && self.serial.read(&mut byte).is_ok() {}
        self.serial.set_read_timeout(Some(TIMEOUT)).unwrap();
    }

    /// Has the guest write to its page `n`, and waits until it has.
    fn write(&mut self, n: u8) {
        self.serial.write_all(&[n]).unwrap();
        let mut echo = [0];
        self.serial.read_exact(&mut echo).unwrap();
        assert_eq!(echo, [n]);
    }

    fn attach(&self, handles: PluginHandles) -> (Tracker, BlockId) {
        let address =
            self.handles.find_mapping(&self.memory).unwrap().expect("QEMU has mapped its RAM");
        let block = TrackedBlock {
            name: "pc.ram".into(),
            host_address: address,
            bytes: RAM,
            memory: BlockMemory::Shared(self.memory.clone()),
        };
        let tracker = Tracker::attach(handles, vec![block]).unwrap();
        let id = tracker.find("pc.ram").unwrap();
        (tracker, id)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        match &mut self.process {
            Process::Ours(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Process::Daemon(pid) => {
                let _ = Command::new("kill").arg("-KILL").arg(pid.to_string()).status();
            }
        }
    }
}

fn start(command: &mut Command, memory: &GuestMemory, daemonize: bool, pid_file: &Path) -> Process {
    static STARTING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = STARTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    memory.set_inheritable(true).unwrap();
    let mut child = command.stdin(Stdio::null()).spawn().expect("QEMU starts");
    memory.set_inheritable(false).unwrap();
    if !daemonize {
        return Process::Ours(child);
    }
    assert!(child.wait().unwrap().success(), "QEMU does not start");
    Process::Daemon(fs::read_to_string(pid_file).unwrap().trim().parse().unwrap())
}

fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > deadline => panic!("{}: {error}", path.display()),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn upload(tracker: &mut Tracker, block: BlockId) -> Vec<u64> {
    let mut claim = tracker.begin_claim(checkpoint());
    let pages = numbers(&tracker.claim(block, &mut claim).unwrap());
    acknowledge(claim);
    pages
}

/// The pages of a history: some once, some often, some never, the first and the last included.
const PASSES: [&[u8]; 4] = [&[0, 1, 2, GUEST_PAGES - 1], &[], &[7, 7, 7], &[1, 30, 31, 32, 64, 0]];

fn pages_of(writes: &[u8]) -> Vec<u64> {
    let mut pages: Vec<u64> = writes.iter().map(|n| FIRST_PAGE + u64::from(*n)).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

fn tracks_exactly(vm: &mut Vm, api_versions: &[u32]) {
    assert!(api_versions.contains(&vm.handles.plugin_api_version()));
    assert_eq!(vm.handles.pid(), vm.pid());
    let passed = vm.handles.ram("pc.ram").unwrap().expect("ramfd= was given");
    assert_eq!(passed.inode().unwrap(), vm.memory.inode().unwrap());

    let again = PluginHandles::connect(&vm._dir.path().join("plugin.sock"), TIMEOUT).unwrap();
    let (mut tracker, ram) = vm.attach(again);
    vm.write(5);
    let all = upload(&mut tracker, ram);
    assert!(all.contains(&(FIRST_PAGE + 5)) && all.len() > 1, "{all:?}");
    for writes in PASSES {
        for n in writes {
            vm.write(*n);
        }
        assert_eq!(upload(&mut tracker, ram), pages_of(writes));
    }
    let mut content = [0; PAGE as usize];
    let seventh = checkpoint_format::PageRange::single((FIRST_PAGE + 7).into());
    tracker.read_pages(ram, seventh, &mut content).unwrap();
    assert_eq!(content[..2], 3u16.to_le_bytes());
}

#[test]
fn every_qemu_and_accelerator_is_tracked_exactly() {
    for qemu in qemus() {
        for accelerator in accelerators() {
            let mut vm = Vm::start(&qemu, accelerator, false);
            tracks_exactly(&mut vm, &[1, 2, 7]);
            eprintln!("{} {accelerator}: ok", qemu.display());
        }
    }
}

#[test]
fn a_qemu_in_the_background_is_tracked_too() {
    for qemu in qemus() {
        let mut vm = Vm::start(&qemu, "tcg", true);
        tracks_exactly(&mut vm, &[1, 2, 7]);
    }
}

/// What QEMU says when it does not like the plugin.
fn complaint(qemu: &Path, socket: &Path, version: &str) -> String {
    let mut command = Command::new(qemu);
    command.args(["-nodefaults", "-display", "none", "-machine", "none", "-S"]);
    command.arg("-plugin").arg(format!(
        "file={},socket={}",
        built().plugin.display(),
        socket.display()
    ));
    command.env("STILLPOINT_PLUGIN_API", version);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn an_impossible_version_makes_qemu_name_its_own() {
    let dir = TempDir::new().unwrap();
    for qemu in qemus() {
        let text = complaint(&qemu, &dir.path().join("plugin.sock"), "999");
        assert!(
            text.contains("plugin requires API version 999, but this QEMU supports only"),
            "{text}"
        );
    }
}

#[test]
fn a_plugin_that_cannot_listen_stops_qemu_with_its_reason() {
    for qemu in qemus() {
        let text = complaint(&qemu, Path::new("/nonexistent/plugin.sock"), "");
        assert!(
            text.contains("stillpoint plugin: cannot listen on /nonexistent/plugin.sock"),
            "{text}"
        );
    }
}
