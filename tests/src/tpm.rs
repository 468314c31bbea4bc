//! A software TPM beside a VM, and what a guest would do with it, by QEMU's test protocol.

use crate::process::wait_until;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(20);
/// Register block of locality 0 of a `tpm-tis`.
const TIS: u64 = 0xFED4_0000;
const ACCESS: u64 = 0;
const STATUS: u64 = 0x18;
const DATA: u64 = 0x24;

/// `swtpm` with a state directory of its own; ended when dropped.
pub struct SoftwareTpm {
    pub socket: PathBuf,
    child: Child,
}

impl SoftwareTpm {
    /// A TPM 2.0.
    pub fn start(directory: &Path) -> Self {
        Self::start_with(directory, &["--tpm2"])
    }

    pub fn start_with(directory: &Path, words: &[&str]) -> Self {
        std::fs::create_dir_all(directory).expect("a directory");
        let socket = directory.join("sock");
        let state = format!("dir={}", directory.display());
        let control = format!("type=unixio,path={}", socket.display());
        let mut command = Command::new("swtpm");
        command.args(["socket", "--tpmstate", &state, "--ctrl", &control]).args(words);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("scripts/install-deps installs swtpm");
        assert!(wait_until(TIMEOUT, || socket.exists()), "swtpm does not start");
        Self { socket, child }
    }

    /// Arguments by which a VM gets it, at `device`.
    pub fn arguments(&self, device: &str) -> Vec<String> {
        let chardev = format!("socket,id=c,path={}", self.socket.display());
        let device = format!("{device},tpmdev=t");
        ["-chardev", &chardev, "-tpmdev", "emulator,id=t,chardev=c", "-device", &device]
            .map(str::to_owned)
            .to_vec()
    }
}

impl Drop for SoftwareTpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The registers of a VM's `tpm-tis`, by way of its `-qtest` socket.
pub struct Tis {
    read: BufReader<UnixStream>,
    write: UnixStream,
}

impl Tis {
    pub fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket)
            .unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        stream.set_read_timeout(Some(TIMEOUT)).expect("a socket");
        Self { read: BufReader::new(stream.try_clone().expect("a socket")), write: stream }
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.write, "{line}").expect("QEMU's test socket");
        loop {
            let mut answer = String::new();
            assert!(
                self.read.read_line(&mut answer).expect("QEMU's test socket") > 0,
                "QEMU has ended"
            );
            // QEMU reports interrupts between the answers.
            if !answer.starts_with("IRQ") {
                return answer.trim().to_owned();
            }
        }
    }

    fn read(&mut self, register: u64) -> u8 {
        let answer = self.ask(&format!("readb {:#x}", TIS + register));
        let digits = answer.strip_prefix("OK 0x").unwrap_or_else(|| panic!("{answer}"));
        u64::from_str_radix(digits, 16).expect("a number") as u8
    }

    fn write(&mut self, register: u64, value: u8) {
        let answer = self.ask(&format!("writeb {:#x} {value:#x}", TIS + register));
        assert_eq!(answer, "OK");
    }

    fn wait(&mut self, register: u64, bits: u8) {
        let set = wait_until(TIMEOUT, || self.read(register) & bits == bits);
        assert!(set, "register {register:#x} has not {bits:#x}");
    }

    /// One command; the answer.
    fn command(&mut self, command: &[u8]) -> Vec<u8> {
        self.write(ACCESS, 0x02);
        self.wait(ACCESS, 0x20);
        self.write(STATUS, 0x40);
        self.wait(STATUS, 0x40);
        command.iter().for_each(|byte| self.write(DATA, *byte));
        self.write(STATUS, 0x20);
        self.wait(STATUS, 0x90);
        let mut answer: Vec<u8> = (0..10).map(|_| self.read(DATA)).collect();
        let length = u32::from_be_bytes(answer[2..6].try_into().expect("four bytes"));
        answer.extend((10..length.min(4096)).map(|_| self.read(DATA)));
        self.write(STATUS, 0x40);
        self.write(ACCESS, 0x20);
        answer
    }

    /// `TPM2_PCR_Extend` of a SHA-256 register.
    pub fn extend(&mut self, register: u32, byte: u8) {
        let mut command = vec![0x80, 0x02, 0, 0, 0, 65, 0, 0, 0x01, 0x82];
        command.extend(register.to_be_bytes());
        command.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0]);
        command.extend([0, 0, 0, 1, 0, 0x0b]);
        command.extend([byte; 32]);
        let answer = self.command(&command);
        assert_eq!(answer[6..10], [0; 4], "{answer:02x?}");
    }

    /// `TPM2_PCR_Read`: the register's value.
    pub fn pcr(&mut self, register: u32) -> Vec<u8> {
        let mut selected = [0; 3];
        selected[register as usize / 8] = 1 << (register % 8);
        let head = [0x80, 0x01, 0, 0, 0, 20, 0, 0, 0x01, 0x7e, 0, 0, 0, 1, 0, 0x0b, 3];
        let answer = self.command(&[&head[..], &selected].concat());
        assert!(answer[6..10] == [0; 4] && answer.len() > 32, "{answer:02x?}");
        answer[answer.len() - 32..].to_vec()
    }
}
