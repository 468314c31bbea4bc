//! From a VM file to the words of the QEMU process: the user's options, and what checkpointing
//! adds.

use super::{arguments, instance};
use crate::process;
use crate::runtime_dir::{RuntimeDir, VmFile};
use qmp_bridge::quirks::{self, Release};
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::Path;

/// The character device of Stillpoint's monitor in a managed VM.
pub const MONITOR_CHARDEV: &str = "stillpoint-qmp";

/// How the new QEMU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start<'a> {
    /// As the user's options say, and those of the first start alone.
    Boot(&'a [String]),
    /// Paused, with the state to be loaded.
    Incoming,
}

/// Everything after the program's name. `ram` is the memfd's number in the child. Without the
/// plugin nothing can track the memory.
pub fn arguments(
    vm: &VmFile,
    runtime: &RuntimeDir,
    plugin: Option<&Path>,
    ram: RawFd,
    start: Start<'_>,
) -> Vec<OsString> {
    let block = &vm.ram_block;
    let mut words: Vec<OsString> = vm.arguments.iter().map(OsString::from).collect();
    let mut add =
        |option: &str, value: String| words.extend([OsString::from(option), OsString::from(value)]);
    let bytes = vm.ram_bytes;
    // Machine types before 4.1 would call the RAM block by the object's path and not by its id.
    let name = "x-use-canonical-path-for-ramblock-id=off";
    add(
        "-object",
        format!(
            "memory-backend-file,id={block},size={bytes}B,share=on,mem-path=/proc/self/fd/{ram},{name}"
        ),
    );
    // QEMU takes one or the other.
    if !is_numa_memory(&vm.arguments, block) {
        add("-machine", format!("memory-backend={block}"));
    }
    add("-accel", vm.accelerator.clone());
    add(
        "-chardev",
        format!("socket,id={MONITOR_CHARDEV},path={},server=on,wait=off", runtime.qmp().display()),
    );
    let (option, value) = monitor(&vm.qemu_version, &vm.instance);
    add(option, value);
    if let Some(plugin) = plugin {
        let plugin = plugin.display().to_string().replace(',', ",,");
        add("-plugin", format!("file={plugin},socket={},ramfd={ram}", runtime.plugin().display()));
    }
    // What could not be saved is named by QEMU itself, before the guest begins.
    words.push("-only-migratable".into());
    match start {
        Start::Boot(first) => words.extend(first.iter().map(OsString::from)),
        Start::Incoming => words.extend(["-S", "-incoming", "defer"].map(OsString::from)),
    }
    words
}

/// Whether a NUMA node of the VM names the block as its memory.
fn is_numa_memory(arguments: &[String], block: &str) -> bool {
    let options = arguments::parse(arguments).unwrap_or_default();
    options.iter().any(|option| option.name == "numa" && option.keys().get("memdev") == Some(block))
}

/// The option of Stillpoint's monitor. Its id tells in the list of processes which instance this
/// is: [`is_running`] looks for it.
fn monitor(qemu_version: &str, instance: &str) -> (&'static str, String) {
    let id = monitor_id(instance);
    let release = Release::parse(qemu_version);
    if release.is_some_and(|release| release.has(quirks::MONITORS_ARE_OBJECTS)) {
        ("-object", format!("monitor-qmp,id={id},chardev={MONITOR_CHARDEV}"))
    } else {
        ("-mon", format!("chardev={MONITOR_CHARDEV},mode=control,id={id}"))
    }
}

fn monitor_id(instance: &str) -> String {
    format!("stillpoint-{instance}")
}

/// Whether a QEMU of this instance runs on this host.
pub fn is_running(instance: &str) -> bool {
    if instance::process_runs(instance) == Some(true) {
        return true;
    }
    // An adopted VM keeps its instance, and its new QEMU has the mark of ours.
    let id = monitor_id(instance);
    let has_id = |word: &Vec<u8>| word.windows(id.len()).any(|part| part == id.as_bytes());
    let mut lines = process::all().filter_map(|process| process::command_line(&process).ok());
    lines.any(|words| words.iter().any(has_id))
}

#[cfg(test)]
mod test {
    use super::*;

    fn line(arguments: &[&str]) -> String {
        let vm = VmFile {
            format: VmFile::FORMAT,
            name: "m".parse().unwrap(),
            store: "file:///s".to_owned(),
            instance: "i".to_owned(),
            qemu: "qemu".into(),
            pid: None,
            qemu_version: "10.0.2".to_owned(),
            machine_type: "pc-q35-10.0".to_owned(),
            accelerator: "tcg".to_owned(),
            ram_bytes: 1 << 20,
            ram_block: "ram-node0".to_owned(),
            arguments: arguments.iter().map(|word| (*word).to_owned()).collect(),
            directory: "/vm".into(),
            fleecing: "/var/tmp".into(),
            restored_from: None,
            external: None,
        };
        let runtime = RuntimeDir::new(Some(Path::new("/run/x")), &vm.name).unwrap();
        let words = super::arguments(&vm, &runtime, Some(Path::new("/p.so")), 7, Start::Boot(&[]));
        words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn memory_is_named_by_the_vm_or_by_its_numa_node() {
        let by_vm = "-machine memory-backend=ram-node0";
        assert!(line(&["-numa", "node,cpus=0"]).contains(by_vm));
        let by_node = line(&["-numa", "node,cpus=0,memdev=ram-node0"]);
        assert!(
            !by_node.contains(by_vm)
                && by_node.contains("-object memory-backend-file,id=ram-node0,size=1048576B"),
            "{by_node}"
        );
    }

    #[test]
    fn monitor_is_an_object_where_qemu_wants_one() {
        assert_eq!(
            monitor("7.2.22", "i"),
            ("-mon", "chardev=stillpoint-qmp,mode=control,id=stillpoint-i".to_owned())
        );
        assert_eq!(monitor("11.0.9", "i").0, "-mon");
        assert_eq!(
            monitor("11.1.3", "i"),
            ("-object", "monitor-qmp,id=stillpoint-i,chardev=stillpoint-qmp".to_owned())
        );
        assert_eq!(monitor("12.0.0", "i").0, "-object");
    }

    #[test]
    fn a_running_instance_is_found_by_its_command_line() {
        let instance = format!("test-{}", std::process::id());
        assert!(!is_running(&instance));
        let id = monitor_id(&instance);
        // Its own arguments are the shell's, which waits for input.
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read line", &id])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // A process shows no arguments for a moment while it starts.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !is_running(&instance) {
            assert!(std::time::Instant::now() < end, "not found");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_running(&instance));
    }
}
