//! From a machine file to the words of the QEMU process: the user's options, and what checkpointing adds.

use crate::runtime::{MachineFile, RuntimeDir};
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::Path;

/// How the new QEMU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// As the user's options say.
    Boot,
    /// Paused, with the state to be loaded.
    Incoming,
}

/// Everything after the program's name. `ram` is the memfd's number in the child.
pub fn arguments(machine: &MachineFile, runtime: &RuntimeDir, plugin: &Path, ram: RawFd, start: Start) -> Vec<OsString> {
    let block = &machine.ram_block;
    let mut words: Vec<OsString> = machine.arguments.iter().map(OsString::from).collect();
    let mut add = |option: &str, value: String| words.extend([OsString::from(option), OsString::from(value)]);
    let bytes = machine.ram_bytes;
    add("-object", format!("memory-backend-file,id={block},size={bytes}B,share=on,mem-path=/proc/self/fd/{ram}"));
    add("-machine", format!("memory-backend={block}"));
    add("-accel", machine.accelerator.clone());
    add("-chardev", format!("socket,id=stillpoint-qmp,path={},server=on,wait=off", runtime.qmp().display()));
    add("-mon", "chardev=stillpoint-qmp,mode=control".to_owned());
    let plugin = plugin.display().to_string().replace(',', ",,");
    add("-plugin", format!("file={plugin},socket={},ramfd={ram}", runtime.plugin().display()));
    if start == Start::Incoming {
        words.extend(["-S", "-incoming", "defer"].map(OsString::from));
    }
    words
}
