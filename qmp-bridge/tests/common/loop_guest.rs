//! A guest of 64 KiB firmware that counts in memory for ever: enough to see whether a restored VM
//! continues.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tempfile::TempDir;

use super::TestQemu;

pub(crate) const RAM: u64 = 32 << 20;
const COUNTER: u64 = 0x1000;
const FIRMWARE: usize = 64 << 10;
/// Where the processor begins, from the end of the firmware.
const RESET_VECTOR: usize = 16;

/// `xor ax,ax; mov ds,ax; again: inc dword [0x1000]; jmp again`, and a far jump to it at the reset
/// vector.
fn firmware() -> Vec<u8> {
    let mut image = vec![0xf4; FIRMWARE];
    let code = [0x31, 0xc0, 0x8e, 0xd8, 0x66, 0xff, 0x06, 0x00, 0x10, 0xeb, 0xf9];
    image[..code.len()].copy_from_slice(&code);
    let jump = [0xea, 0x00, 0x00, 0x00, 0xf0];
    image[FIRMWARE - RESET_VECTOR..FIRMWARE - RESET_VECTOR + jump.len()].copy_from_slice(&jump);
    image
}

/// Sealed memory for a guest, inherited by the QEMUs started from here.
pub(crate) fn guest_memory() -> File {
    let fd: OwnedFd = memfd_create(c"guest", MFdFlags::MFD_ALLOW_SEALING).expect("memfd");
    let file = File::from(fd);
    file.set_len(RAM).expect("size");
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seal");
    file
}

pub(crate) fn counter(memory: &File) -> u32 {
    let mut bytes = [0; 4];
    memory.read_exact_at(&mut bytes, COUNTER).expect("read memory");
    u32::from_le_bytes(bytes)
}

/// Starts the counting guest with several kinds of devices.
pub(crate) async fn start(qemu: &Path, vm: &str, memory: &File, more: &[&str]) -> TestQemu {
    let directory: TempDir = tempfile::tempdir().expect("directory");
    std::fs::write(directory.path().join("firmware.bin"), firmware()).expect("firmware");
    File::create(directory.path().join("disk.img"))
        .and_then(|file| file.set_len(1 << 20))
        .expect("disk");
    let backend = format!(
        "memory-backend-file,id=pc.ram,size={RAM},share=on,mem-path=/proc/self/fd/{}",
        memory.as_raw_fd()
    );
    let vm = format!("{vm},memory-backend=pc.ram");
    let mut arguments = vec![
        "-accel",
        "tcg",
        "-object",
        &backend,
        "-M",
        &vm,
        "-m",
        "32",
        "-bios",
        "firmware.bin",
        "-vga",
        "std",
        "-device",
        "virtio-net-pci",
        "-device",
        "virtio-rng-pci",
        "-drive",
        "if=none,id=d0,file=disk.img,format=raw",
        "-device",
        "virtio-blk-pci,drive=d0",
    ];
    arguments.extend(more);
    TestQemu::start_in(qemu, &arguments, directory).await
}
