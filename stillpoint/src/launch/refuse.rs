//! What cannot be checkpointed is refused before the guest starts, with the reason and what to do instead.
//!
//! The tracker sees every write that goes through QEMU's own mapping of guest RAM: vCPUs, emulated devices, vhost
//! in the kernel. It does not see a process or a piece of hardware that writes through a mapping of its own, nor
//! holes punched into the memory. Such a machine would be saved wrongly without a sign, so it is not started.

use super::arguments::QemuOption;
use anyhow::{Result, bail};

/// Device models (a prefix of the `-device` driver) and why they cannot be tracked.
const DEVICES: &[(&str, &str, &str)] = &[
    ("vhost-user", "a vhost-user daemon writes guest RAM through a mapping of its own", "use the virtio device that QEMU emulates"),
    ("vfio-", "an assigned device writes guest RAM by DMA, past the page tables", "use an emulated or vhost (kernel) device"),
    ("virtio-balloon", "the balloon punches holes into guest RAM, which no page fault shows", "leave the balloon out"),
    ("virtio-mem", "virtio-mem punches holes into guest RAM, which no page fault shows", "give the machine all of its memory by -m"),
    ("virtio-pmem", "virtio-pmem maps a file that is no part of the checkpoint", "use a virtio-blk disk"),
    ("nvdimm", "an NVDIMM maps a file that is no part of the checkpoint", "use a virtio-blk disk"),
    ("ivshmem", "other processes write the shared memory of ivshmem", "use a virtio-serial or network device"),
    ("virtio-9p", "a mounted 9p share blocks QEMU's migration", "use a disk or a network file system"),
];

/// Whole options that cannot go together with checkpoints.
const OPTIONS: &[(&str, &str, &str)] = &[
    ("mem-path", "it gives the guest RAM of its own", "leave it out: Stillpoint gives the machine sealed shared memory"),
    ("incoming", "it waits for somebody else's machine", "use 'stillpoint restore', or start the machine without it"),
    ("snapshot", "it writes to disks that vanish with QEMU", "make an overlay: qemu-img create -f qcow2 -b BASE -F qcow2 OVERLAY"),
    ("preconfig", "the machine would not exist when the helper attaches", "leave it out"),
    ("virtfs", "a mounted 9p share blocks QEMU's migration", "use a disk or a network file system"),
    ("xen-attach", "Xen owns the guest's memory", "run the guest under KVM or TCG"),
];

pub fn check(options: &[QemuOption]) -> Result<()> {
    options.iter().try_for_each(check_option)
}

fn check_option(option: &QemuOption) -> Result<()> {
    if let Some((name, why, remedy)) = OPTIONS.iter().find(|(name, ..)| *name == option.name) {
        bail!("QEMU option -{name} cannot be used with checkpoints: {why}; {remedy}");
    }
    match option.name.as_str() {
        "device" => check_device(option),
        "object" => check_object(option),
        "machine" | "M" if option.keys().get("memory-backend").is_some() => bail!(
            "-machine memory-backend={} gives the guest RAM of its own; leave it out: Stillpoint gives the machine sealed shared memory",
            option.keys().get("memory-backend").unwrap_or_default()
        ),
        "numa" if option.keys().get("memdev").is_some() => {
            bail!("-numa memdev=… gives the guest RAM of its own, which the tracker does not map; use -numa node,cpus=… without memdev")
        }
        "drive" if option.keys().get("snapshot") == Some("on") => bail!(
            "-drive snapshot=on writes to a disk that vanishes with QEMU; make an overlay: qemu-img create -f qcow2 -b BASE -F qcow2 OVERLAY"
        ),
        "netdev" | "nic" if option.keys().get_or_implied("type") == Some("vhost-user") => {
            bail!("-{} vhost-user: a vhost-user daemon writes guest RAM through a mapping of its own; use tap, user or bridge", option.name)
        }
        _ => Ok(()),
    }
}

fn check_device(option: &QemuOption) -> Result<()> {
    let keys = option.keys();
    let driver = keys.get_or_implied("driver").unwrap_or_default();
    if let Some((_, why, remedy)) = DEVICES.iter().find(|(prefix, ..)| driver.starts_with(prefix)) {
        bail!("-device {driver} cannot be checkpointed: {why}; {remedy}");
    }
    Ok(())
}

fn check_object(option: &QemuOption) -> Result<()> {
    let keys = option.keys();
    let kind = keys.get_or_implied("qom-type").unwrap_or_default();
    if kind.starts_with("memory-backend-") {
        bail!(
            "-object {kind} gives the guest RAM that the tracker cannot map; leave it out: Stillpoint gives the machine sealed shared memory of the size of -m"
        );
    }
    if ["sev-guest", "sev-snp-guest", "tdx-guest"].contains(&kind) {
        bail!("-object {kind}: encrypted guest memory cannot be read by the helper; run the guest without it");
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::super::arguments::parse;
    use super::*;

    fn refused(line: &str) -> String {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        check(&parse(&words).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn every_refusal_names_the_option_and_a_remedy() {
        let lines = [
            "-device vhost-user-blk-pci,chardev=c",
            "-device vfio-pci,host=01:00.0",
            "-device virtio-balloon-pci",
            "-object memory-backend-ram,id=m,size=1G",
            "-machine q35,memory-backend=m",
            "-numa node,memdev=m",
            "-mem-path /dev/hugepages",
            "-incoming defer",
            "-snapshot",
            "-netdev vhost-user,id=n,chardev=c",
            "-drive file=a,snapshot=on",
        ];
        for line in lines {
            let text = refused(line);
            let named = line.split([' ', ',', '=']).filter(|word| word.len() > 3);
            assert!(named.clone().any(|word| text.contains(word)), "{line}: {text}");
            assert!(text.contains(';'), "{line}: no remedy in '{text}'");
        }
    }

    #[test]
    fn an_ordinary_machine_passes() {
        let line = "-m 1G -smp 4 -machine q35 -drive file=a.qcow2,if=virtio -netdev tap,id=n,vhost=on -device virtio-net-pci,netdev=n";
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        check(&parse(&words).unwrap()).unwrap();
    }
}
