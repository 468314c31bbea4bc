//! What cannot be checkpointed is refused before anything is done, with the reason and what to do
//! instead.
//!
//! The tracker sees every write that goes through QEMU's own mapping of guest RAM: vCPUs, emulated
//! devices, vhost in the kernel. It does not see a process or a piece of hardware that writes
//! through a mapping of its own. Such a VM would be saved wrongly without a sign, so it is not
//! started.
//!
//! QEMU's own migration stream does not ask whose memory it is. So a VM that is attached by its
//! monitor may have what one of ours may not; what no engine can save is refused to both.

use super::arguments::QemuOption;
use super::form::{Form, is_on};
use super::unsupported_disks;
use anyhow::{Result, bail};
use qemu_cmdline::{Use, table, visit};
use qmp_bridge::devices::GuestDevice;
use std::path::Path;

/// For whom a rule stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// No engine can save it.
    Always,
    /// Only a VM that we start: it gets memory of ours, and must come up by itself.
    Launched,
}

impl Rules {
    /// A VM of ours obeys all of them.
    fn include(self, rule: Self) -> bool {
        self == rule || self == Self::Launched
    }
}

const LEAVE_MEMORY: &str = "leave it out: Stillpoint gives the VM sealed shared memory";
const OVERLAY: &str = "make an overlay: qemu-img create -f qcow2 -b BASE -F qcow2 OVERLAY";

type Rule = (&'static str, Rules, &'static str, &'static str);

/// Device models (a prefix of the `-device` driver) and why they cannot be saved.
const DEVICES: &[Rule] = &[
    (
        "vmbus-bridge",
        Rules::Always,
        "QEMU aborts, guest and all, when it saves this device's state",
        "leave VMBus out",
    ),
    (
        "pci-serial-2x",
        Rules::Always,
        "QEMU aborts, guest and all, when it saves this device's state",
        "use pci-serial or pci-serial-4x",
    ),
    (
        "vhost-user",
        Rules::Always,
        "a vhost-user daemon writes guest RAM through a mapping of its own",
        "use the virtio device that QEMU emulates",
    ),
    (
        "vhost-vdpa",
        Rules::Always,
        "its hardware writes guest RAM by DMA, past the page tables",
        "use an emulated or vhost (kernel) device",
    ),
    (
        "vfio-",
        Rules::Always,
        "an assigned device writes guest RAM by DMA, past the page tables",
        "use an emulated or vhost (kernel) device",
    ),
    (
        "virtio-mem",
        Rules::Always,
        "a checkpoint knows one memory, the VM's own",
        "give the VM all of its memory by -m",
    ),
    (
        "virtio-pmem",
        Rules::Always,
        "virtio-pmem maps a file that is no part of the checkpoint",
        "use a virtio-blk disk",
    ),
    (
        "nvdimm",
        Rules::Always,
        "an NVDIMM maps a file that is no part of the checkpoint",
        "use a virtio-blk disk",
    ),
    (
        "pc-dimm",
        Rules::Always,
        "a checkpoint knows one memory, the VM's own",
        "give the VM all of its memory by -m",
    ),
    (
        "ivshmem",
        Rules::Always,
        "other processes write the shared memory of ivshmem",
        "use a virtio-serial or network device",
    ),
    (
        "scsi-block",
        Rules::Always,
        "it sends the guest's writes to the hardware past QEMU's bitmaps",
        "use scsi-hd on the same device",
    ),
    (
        "scsi-generic",
        Rules::Always,
        "it sends the guest's writes to the hardware past QEMU's bitmaps",
        "use scsi-hd on the same device",
    ),
    (
        "virtio-9p",
        Rules::Launched,
        "a mounted 9p share blocks QEMU's migration",
        "use a disk or a network file system",
    ),
];

/// Whole options that cannot go together with checkpoints.
const OPTIONS: &[Rule] = &[
    ("mem-path", Rules::Launched, "it gives the guest RAM of its own", LEAVE_MEMORY),
    (
        "incoming",
        Rules::Launched,
        "it waits for the VM of another QEMU",
        "use 'stillpoint restore', or start the VM without it",
    ),
    ("runas", Rules::Launched, OTHER_USER, OWN_USER),
    ("snapshot", Rules::Always, "it writes to disks that vanish with QEMU", OVERLAY),
    (
        "preconfig",
        Rules::Launched,
        "the VM would not exist when the helper attaches",
        "leave it out",
    ),
    (
        "virtfs",
        Rules::Launched,
        "a mounted 9p share blocks QEMU's migration",
        "use a disk or a network file system",
    ),
    ("xen-attach", Rules::Always, "Xen owns the guest's memory", "run the guest under KVM or TCG"),
    ("add-fd", Rules::Launched, "a descriptor is no other process's", "name the file by its path"),
];

/// Objects by the beginning of their type.
const OBJECTS: &[Rule] = &[
    (
        "memory-backend-epc",
        Rules::Always,
        "SGX memory cannot be read by the host",
        "run the guest without it",
    ),
    (
        "memory-backend-",
        Rules::Launched,
        "it gives the guest RAM that the tracker cannot map",
        "leave it out: Stillpoint gives the VM sealed shared memory of the size of -m",
    ),
    ("sev-guest", Rules::Always, ENCRYPTED, UNENCRYPTED),
    ("sev-snp-guest", Rules::Always, ENCRYPTED, UNENCRYPTED),
    ("tdx-guest", Rules::Always, ENCRYPTED, UNENCRYPTED),
    (
        "x-remote-object",
        Rules::Always,
        "a process of its own holds the device",
        "use the device that QEMU emulates",
    ),
];

const OTHER_USER: &str =
    "a restored VM's files and sockets are open to the user of the restore alone";
const OWN_USER: &str = "start 'stillpoint run' as that user";
const ENCRYPTED: &str = "encrypted guest memory cannot be read by the helper";
const UNENCRYPTED: &str = "run the guest without it";

/// `directory` is QEMU's working directory.
///
/// # Errors
/// Refused at the first option that no checkpoint can have, with the reason and what to do.
pub fn check(options: &[QemuOption], rules: Rules, directory: &Path) -> Result<()> {
    check_known(options, directory)?;
    unsupported_disks::check(options)?;
    if rules == Rules::Launched {
        check_descriptors(options)?;
    }
    options.iter().try_for_each(|option| check_option(option, rules))
}

/// What the table does not know and could be a file is not guessed at.
fn check_known(options: &[QemuOption], directory: &Path) -> Result<()> {
    if let Some(option) = options.iter().find(|option| table::syntax(&option.name).is_none()) {
        bail!(
            "QEMU option -{} is not in Stillpoint's table of options (QEMU 7.2 to 11.1): its meaning is unknown; leave it out",
            option.name
        );
    }
    let braces = options.iter().find(|option| {
        option.value().starts_with('{') && matches!(Form::of(option), Form::List { .. })
    });
    if let Some(option) =
        braces.filter(|option| matches!(table::syntax(&option.name), Some(table::Syntax::Keys(..))))
    {
        bail!(
            "-{} {} begins as JSON and is none; write it with double quotes, or as a list",
            option.name,
            option.value()
        );
    }
    let mut unknown = None;
    visit(options, |site| {
        let is_file = || !is_word(site.value) && directory.join(site.value).is_file();
        if site.means == Use::Unknown && (site.value.contains('/') || is_file()) {
            unknown.get_or_insert_with(|| format!("-{} {}={}", site.option, site.key, site.value));
        }
    });
    match unknown {
        None => Ok(()),
        Some(what) => bail!(
            "{what} could be a file, and Stillpoint's table of options does not know it; leave it out"
        ),
    }
}

/// QEMU's own words, after which a file may be called too.
fn is_word(text: &str) -> bool {
    const WORDS: &[&str] =
        &["on", "off", "yes", "no", "true", "false", "auto", "none", "default", "raw", "qcow2", ""];
    WORDS.contains(&text) || text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A restored VM is another process, which has none of this one's descriptors.
fn check_descriptors(options: &[QemuOption]) -> Result<()> {
    let mut found = None;
    visit(options, |site| {
        let is_key = matches!(
            site.key.rsplit('.').next(),
            Some("fd" | "fds" | "vhostfd" | "vhostfds" | "sock_fd" | "sock-fds")
        );
        if site.means == Use::Process && is_key || site.value.starts_with("/dev/fdset/") {
            found.get_or_insert_with(|| format!("-{} {}={}", site.option, site.key, site.value));
        }
    });
    match found {
        None => Ok(()),
        Some(what) => bail!(
            "{what} is a descriptor of this process, and no other process has it; name the file, socket or tap instead"
        ),
    }
}

fn find(table: &[Rule], rules: Rules, fits: impl Fn(&str) -> bool) -> Option<&Rule> {
    table.iter().find(|(name, rule, ..)| rules.include(*rule) && fits(name))
}

fn check_option(option: &QemuOption, rules: Rules) -> Result<()> {
    if let Some((name, _, why, remedy)) = find(OPTIONS, rules, |name| name == option.name) {
        bail!("QEMU option -{name} cannot be used with checkpoints: {why}; {remedy}");
    }
    let form = Form::of(option);
    match option.name.as_str() {
        "device" => check_device(&form, rules),
        "audio" => {
            check_state("audio model", table::audio_model(&form.get("model").unwrap_or_default()))
        }
        "usbdevice" => check_state("usbdevice", &format!("usb-{}", option.value())),
        "object" => check_object(&form, rules),
        "run-with" if rules == Rules::Launched && form.has("user") => {
            bail!("-run-with user= cannot be used with checkpoints: {OTHER_USER}; {OWN_USER}")
        }
        "machine" | "M" => check_vm(&form, rules),
        "numa" if rules == Rules::Launched && form.has("memdev") => {
            bail!(
                "-numa memdev=… gives the guest RAM of its own, which the tracker does not map; leave -numa out (QEMU takes no node without \
                 memdev), or start QEMU without 'stillpoint run' and attach to it by 'stillpoint attach --qmp'"
            )
        }
        "global" => check_global(option),
        "icount" if form.has("rr") => {
            bail!("-icount rr=… records or replays, and QEMU saves no state of that; leave rr out")
        }
        "netdev" | "nic" => check_network(&option.name, &form),
        _ => Ok(()),
    }
}

fn check_device(form: &Form, rules: Rules) -> Result<()> {
    let driver = form.get("driver").unwrap_or_default();
    if let Some((_, _, why, remedy)) = find(DEVICES, rules, |prefix| driver.starts_with(prefix)) {
        bail!("-device {driver} cannot be checkpointed: {why}; {remedy}");
    }
    check_state("device", &driver)?;
    if driver == "loader" && form.has("data") {
        bail!(
            "-device loader,data=… cannot be checkpointed: QEMU writes it into the guest's memory whenever it starts, also when it \
             starts for a restore; use -device loader,file=…"
        );
    }
    for key in ["failover", "failover_pair_id"] {
        if let Some(value) = form.get(key) {
            check_failover(&format!("device {driver}"), key, &value)?;
        }
    }
    if form.is_on("free-page-hint") {
        bail!(
            "-device {driver},free-page-hint=on keeps pages out of QEMU's migration stream; leave free-page-hint out"
        );
    }
    Ok(())
}

/// Why a checkpoint with a device that QEMU has would be wrong; none if it is fine.
pub fn device_refusal(device: &GuestDevice) -> Option<String> {
    let unsaved = || table::unsaved(&device.kind).map(|(why, remedy)| format!("{why}; {remedy}"));
    device.refusal().map(str::to_owned).or_else(unsaved)
}

/// That QEMU can save what the device model holds.
fn check_state(option: &str, model: &str) -> Result<()> {
    if table::UNMIGRATABLE.contains(&model) {
        bail!(
            "-{option} {model} cannot be checkpointed: QEMU itself cannot save its state; use another device"
        );
    }
    match table::unsaved(model) {
        Some((why, remedy)) => bail!("-{option} {model} cannot be checkpointed: {why}; {remedy}"),
        None => Ok(()),
    }
}

fn check_object(form: &Form, rules: Rules) -> Result<()> {
    let kind = form.get("qom-type").unwrap_or_default();
    match find(OBJECTS, rules, |prefix| kind.starts_with(prefix)) {
        Some((_, _, why, remedy)) => {
            bail!("-object {kind} cannot be checkpointed: {why}; {remedy}")
        }
        None => Ok(()),
    }
}

fn check_vm(form: &Form, rules: Rules) -> Result<()> {
    if let Some(backend) = form.get("memory-backend").filter(|_| rules == Rules::Launched) {
        bail!("-machine memory-backend={backend} gives the guest RAM of its own; {LEAVE_MEMORY}");
    }
    for key in ["confidential-guest-support", "memory-encryption"] {
        if let Some(object) = form.get(key) {
            bail!("-machine {key}={object}: {ENCRYPTED}; {UNENCRYPTED}");
        }
    }
    Ok(())
}

/// One half of a failover pair: the primary exists only while the guest's driver wants it, and not
/// during a migration.
fn check_failover(option: &str, key: &str, value: &str) -> Result<()> {
    if key == "failover_pair_id" || key == "failover" && is_on(value) {
        bail!(
            "-{option} {key}={value}: QEMU takes the primary device of a failover pair from the guest at each migration, and has it again \
             only when the guest's driver asks for it; leave failover and failover_pair_id out"
        );
    }
    Ok(())
}

/// Some change what QEMU's stream looks like, and a restored QEMU would read another. Others are a
/// key that a device may not have.
fn check_global(option: &QemuOption) -> Result<()> {
    let Some(Global { driver, property, value }) = Global::of(option) else { return Ok(()) };
    if driver == "migration" {
        bail!("-global {} changes the form of the saved state; leave it out", option.value());
    }
    check_failover("global", &property, &value)?;
    if driver.starts_with("virtio-balloon") && property == "free-page-hint" && is_on(&value) {
        bail!(
            "-global {driver}.{property}={value} keeps pages out of QEMU's migration stream; leave it out"
        );
    }
    if driver == "loader" && property == "data" {
        bail!(
            "-global loader.data={value} cannot be checkpointed: QEMU writes it into the guest's memory whenever it starts; use -device \
             loader,file=…"
        );
    }
    Ok(())
}

/// `-global DRIVER.PROPERTY=VALUE`, or the three by their keys.
struct Global {
    driver: String,
    property: String,
    value: String,
}

impl Global {
    fn of(option: &QemuOption) -> Option<Self> {
        let form = Form::of(option);
        if let Some(driver) = form.get("driver") {
            return Some(Self {
                driver,
                property: form.get("property")?,
                value: form.get("value").unwrap_or_default(),
            });
        }
        let (driver, rest) = option.value().split_once('.')?;
        let (property, value) = rest.split_once('=')?;
        Some(Self {
            driver: driver.to_owned(),
            property: property.to_owned(),
            value: value.to_owned(),
        })
    }
}

fn check_network(option: &str, form: &Form) -> Result<()> {
    match form.get("type").as_deref() {
        Some("vhost-user") => {
            bail!(
                "-{option} vhost-user: a vhost-user daemon writes guest RAM through a mapping of its own; use tap, user or bridge"
            )
        }
        Some("vhost-vdpa") => {
            bail!(
                "-{option} vhost-vdpa: its hardware writes guest RAM by DMA, past the page tables; use tap, user or bridge"
            )
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod test {
    use super::super::arguments::parse;
    use super::*;

    fn refused(line: &str) -> String {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        check(&parse(&words).unwrap(), Rules::Launched, Path::new("/vm")).unwrap_err().to_string()
    }

    #[test]
    fn every_refusal_names_the_option_and_a_remedy() {
        let lines = [
            "-device vhost-user-blk-pci,chardev=c",
            "-device vfio-pci,host=01:00.0",
            "-device virtio-balloon-pci,free-page-hint=on",
            "-object memory-backend-ram,id=m,size=1G",
            "-machine q35,memory-backend=m",
            "-numa node,memdev=m",
            "-mem-path /dev/hugepages",
            "-incoming defer",
            "-runas nobody",
            "-run-with async-teardown=on,user=nobody",
            "-snapshot",
            "-netdev vhost-user,id=n,chardev=c",
            "-drive file=a,snapshot=on",
            "-device nvme,drive=d",
            "-global migration.send-configuration=off",
            "-netdev tap,id=n,fd=3",
            "-add-fd fd=3,set=1",
            "-device something,newfile=/x",
            "-newoption x",
            "-device {'driver':'e1000'}",
        ];
        for line in lines {
            let text = refused(line);
            let named = line.split([' ', ',', '=']).filter(|word| word.len() > 3);
            assert!(named.clone().any(|word| text.contains(word)), "{line}: {text}");
            assert!(text.contains(';'), "{line}: no remedy in '{text}'");
        }
    }

    #[test]
    fn an_ordinary_vm_passes() {
        let line = "-m 1G -smp 4 -machine q35 -drive file=a.qcow2,if=virtio -netdev tap,id=n,vhost=on -device virtio-net-pci,netdev=n";
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        check(&parse(&words).unwrap(), Rules::Launched, Path::new("/vm")).unwrap();
    }

    fn judged(line: &str, rules: Rules) -> bool {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        check(&parse(&words).unwrap(), rules, Path::new("/vm")).is_ok()
    }

    #[test]
    fn a_balloon_is_no_reason_to_refuse() {
        let json = r#"-device {"driver":"virtio-balloon-pci","id":"balloon0"}"#;
        let net = "-device virtio-net-pci,failover=off -global virtio-net-pci.failover=off";
        let hint = "-global virtio-balloon-pci.free-page-hint=off";
        for line in [
            "-device virtio-balloon-pci",
            "-device virtio-balloon-pci,free-page-reporting=on",
            json,
            net,
            hint,
        ] {
            assert!(judged(line, Rules::Always) && judged(line, Rules::Launched), "{line}");
        }
    }

    #[test]
    fn an_attached_vm_may_have_memory_of_its_own() {
        for line in [
            "-object memory-backend-ram,id=m,size=1G",
            "-machine q35,memory-backend=m",
            "-numa node,memdev=m",
            "-mem-path /x",
            "-incoming defer",
            "-runas nobody",
            "-run-with user=nobody",
        ] {
            assert!(judged(line, Rules::Always) && !judged(line, Rules::Launched), "{line}");
        }
    }

    #[test]
    fn what_no_engine_can_save_is_refused_in_every_form() {
        for line in [
            r#"-device {"driver":"vfio-pci","host":"0000:01:00.0"}"#,
            r#"-netdev {"type":"vhost-user","id":"n"}"#,
            "-device vhost-user-fs-pci,chardev=c",
            "-device vhost-vdpa-device-pci,vhostdev=/dev/x",
            "-device ivshmem-doorbell,chardev=c",
            "-device scsi-generic,drive=d",
            "-object tdx-guest,id=t",
            "-netdev vhost-vdpa,id=n",
            "-device virtio-balloon-pci,free-page-hint=on",
            r#"-device {"driver":"virtio-balloon-pci","free-page-hint":true}"#,
            "-device scsi-block,drive=d",
            "-device loader,addr=0x8000,data=1,data-len=4",
            r#"-object {"qom-type":"sev-guest","id":"s"}"#,
            "-machine q35,confidential-guest-support=s",
            "-drive file=a,snapshot=on",
            "-device pc-dimm,memdev=m",
            "-global driver=migration,property=multifd,value=on",
            "-global migration.store-global-state=off",
            "-global virtio-balloon-device.free-page-hint=on",
            "-global driver=virtio-balloon-pci,property=free-page-hint,value=yes",
            "-global loader.data=1",
            "-device usb-mtp",
            "-device virtio-net-pci,id=s,failover=on",
            r#"-device {"driver":"virtio-net-pci","failover":true}"#,
            "-device e1000e,id=p,failover_pair_id=s",
            "-global virtio-net-pci.failover=on",
            "-global driver=virtio-net-device,property=failover,value=on",
            "-device amd-iommu",
            "-device virtio-crypto-pci,cryptodev=c",
            "-device isa-vga",
            r#"-device {"driver":"isa-cirrus-vga"}"#,
            "-device ati-vga",
            "-device cxl-rp,id=r",
            "-audio none,model=adlib",
            "-audio driver=none,model=virtio",
            "-usbdevice braille",
            "-icount shift=1,rr=record,rrfile=x",
        ] {
            assert!(!judged(line, Rules::Always), "{line}");
        }
    }
}
