//! Random command lines: from QEMU's own tables, and as people publish them (libvirt, Proxmox,
//! packer, quickemu, lab scripts).

use super::tables::Tables;
use crate::random::Random;

/// A command line under construction.
pub(super) struct Draw<'a> {
    pub random: Random,
    pub tables: &'a Tables,
    pub words: Vec<String>,
    number: u32,
    has_display: bool,
    vm: String,
}

const KINDS: &str = include_str!("kinds.txt");

/// Writable images, and how their format is called. `files` of [`super::trial`] makes them.
const DISKS: &[(&str, &str)] = &[
    ("data.raw", "raw"),
    ("odd.raw", "raw"),
    ("disk", "raw"),
    ("a b.raw", "raw"),
    ("c,omma.raw", "raw"),
    ("cow.qcow2", "qcow2"),
    ("deep.qcow2", "qcow2"),
    ("new.qcow2", "qcow2"),
    ("qcow2", "qcow2"),
    ("sub/dir.qcow2", "qcow2"),
];
const CACHES: &[&str] = &[
    "",
    "",
    "",
    ",cache=none",
    ",cache=writeback",
    ",cache=unsafe",
    ",cache=directsync",
    ",aio=threads",
    ",discard=unmap",
    ",detect-zeroes=on",
    ",werror=stop",
    ",rerror=report",
    ",copy-on-read=on",
    ",throttling.iops-total=5000",
    ",snapshot=on",
    ",serial=S1",
];

impl<'a> Draw<'a> {
    pub(super) fn new(seed: u64, tables: &'a Tables) -> Self {
        Self {
            random: Random::new(seed),
            tables,
            words: Vec::new(),
            number: 0,
            has_display: false,
            vm: String::new(),
        }
    }

    /// A whole line, without the program.
    pub(super) fn line(mut self) -> Vec<String> {
        if self.one_in(3) {
            return self.published();
        }
        self.board();
        self.boot_disk();
        let parts: &[fn(&mut Self)] = &[
            Self::disk,
            Self::disk,
            Self::disk,
            Self::blockdev,
            Self::medium,
            Self::network,
            Self::network,
            Self::character,
            Self::character,
            Self::display,
            Self::sound,
            Self::usb,
            Self::odd_device,
            Self::odd_device,
            Self::any_device,
            Self::any_device,
            Self::firmware,
            Self::numa,
            Self::global,
            Self::process,
            Self::process,
            Self::clock,
            Self::scsi,
            Self::bridges,
            Self::any_option,
            Self::config,
        ];
        for _ in 0..1 + self.random.below(6) {
            let part = *self.random.pick(parts);
            part(&mut self);
        }
        if !self.has_display {
            self.add("-display none");
        }
        self.words
    }

    /// One of the published lines, as it is or with a little more.
    fn published(mut self) -> Vec<String> {
        self.spell("published");
        let more: &[fn(&mut Self)] = &[
            Self::odd_device,
            Self::firmware,
            Self::clock,
            Self::usb,
            Self::any_device,
            Self::bridges,
        ];
        if self.one_in(3) {
            let part = *self.random.pick(more);
            part(&mut self);
        }
        self.words
    }

    /// Words that hold no spaces.
    fn add(&mut self, words: &str) {
        self.words.extend(words.split(' ').map(str::to_owned));
    }

    fn pair(&mut self, option: &str, value: impl Into<String>) {
        self.words.extend([option.to_owned(), value.into()]);
    }

    fn id(&mut self, prefix: &str) -> String {
        self.number += 1;
        format!("{prefix}{}", self.number)
    }

    /// A list of `kinds.txt`.
    fn list(&self, name: &str) -> Vec<&'static str> {
        let head = format!("[{name}]");
        let lines = KINDS
            .lines()
            .skip_while(|line| *line != head)
            .skip(1)
            .take_while(|line| !line.starts_with('['));
        let list: Vec<&str> =
            lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
        assert!(!list.is_empty(), "kinds.txt has no list {head}");
        list
    }

    fn one(&mut self, name: &str) -> String {
        let list = self.list(name);
        self.of(&list)
    }

    /// Adds one of a list.
    fn spell(&mut self, name: &str) {
        let words = self.one(name);
        self.add(&words);
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.random.below(count) == 0
    }

    fn of(&mut self, list: &[&str]) -> String {
        (*self.random.pick(list)).to_owned()
    }

    fn board(&mut self) {
        self.vm = match self.random.below(8) {
            0 => self.random.pick(&self.tables.vms).clone(),
            1..4 => "q35".to_owned(),
            _ => "pc".to_owned(),
        };
        let mut value = self.vm.clone();
        let properties = self.list("board-properties");
        for _ in 0..self.random.below(3) {
            value += ",";
            value += &self.of(&properties);
        }
        let option = self.of(&["-machine", "-M"]);
        let prefix = if self.one_in(6) { "type=" } else { "" };
        self.pair(&option, format!("{prefix}{value}"));
        if !value.contains("accel=") {
            let accel = self.one("board-accel");
            self.add(&accel);
        }
        let memory = self.of(&[
            "16",
            "16M",
            "32",
            "24M",
            "16384K",
            "size=16M",
            "0.0625G",
            "20",
            "16,slots=2,maxmem=64M",
            "size=32M,maxmem=32M",
            "17",
        ]);
        self.pair("-m", memory);
        match self.random.below(4) {
            0 => {
                let cpu = self.random.pick(&self.tables.cpus).clone();
                let more = self.of(&[
                    "",
                    "",
                    ",+x2apic",
                    ",-sse4.2",
                    ",hv_relaxed,hv_time",
                    ",migratable=on",
                    ",pmu=on",
                    ",enforce",
                ]);
                self.pair("-cpu", format!("{cpu}{more}"));
            }
            // KVM takes no model that the host cannot give, and `max` sets what some hosts refuse.
            1 if !self.words.iter().any(|word| word.contains("kvm")) => self.pair("-cpu", "max"),
            _ => {}
        }
        if self.one_in(3) {
            let smp = self.of(&[
                "2",
                "1",
                "cpus=2,sockets=2",
                "2,cores=2",
                "1,maxcpus=2",
                "4,sockets=1,dies=1,cores=2,threads=2",
            ]);
            self.pair("-smp", smp);
        }
        if !self.one_in(4) {
            self.add("-nodefaults");
        }
        if self.one_in(4) {
            let more = self.one("board-more");
            self.add(&more);
        }
    }

    fn boot_disk(&mut self) {
        self.spell("boot_disk");
    }

    /// A writable or read-only disk by `-drive`.
    fn disk(&mut self) {
        let (name, format) = *self.random.pick(DISKS);
        let escaped = name.replace(',', ",,");
        let cache = self.of(CACHES);
        let id = self.id("d");
        let format = match self.random.below(4) {
            0 => String::new(),
            1 => format!(",driver={format}"),
            _ => format!(",format={format}"),
        };
        let file = match self.random.below(5) {
            0 => format!("file.filename={escaped},file.driver=file"),
            1 => format!("file=file:{escaped}"),
            2 => format!("file=./{escaped}"),
            _ => format!("file={escaped}"),
        };
        let more = self.of(&["", "", "", "", ",readonly=on", ",read-only=on", ",media=disk"]);
        match self.random.below(4) {
            0 => {
                let bus = self.of(&["ide", "virtio", "scsi", "floppy", "sd", "none"]);
                self.pair("-drive", format!("{file}{format},if={bus}{cache}{more}"));
            }
            1 => {
                let shorthand = self.of(&["-hdb", "-hdc", "-hdd"]);
                self.pair(&shorthand, name);
            }
            _ => {
                self.pair("-drive", format!("{file}{format},if=none,id={id}{cache}{more}"));
                let device = self.of(&[
                    "virtio-blk-pci",
                    "virtio-blk-pci,num-queues=2",
                    "ide-hd",
                    "usb-storage",
                    "virtio-blk-pci-non-transitional",
                    "virtio-blk-pci,write-cache=off",
                    "nvme,serial=n1",
                    "virtio-blk-pci,logical_block_size=4096,physical_block_size=4096",
                ]);
                if device == "usb-storage" {
                    self.add("-device qemu-xhci");
                }
                self.pair("-device", format!("{device},drive={id}"));
            }
        }
    }

    fn blockdev(&mut self) {
        let (id, file) = (
            self.id("n"),
            self.of(&["data.raw", "odd.raw", "new.qcow2", "cow.qcow2", "deep.qcow2"]),
        );
        let driver = if file.ends_with("raw") { "raw" } else { "qcow2" };
        let value = match self.random.below(9) {
            0 => format!("driver={driver},node-name={id},file.driver=file,file.filename={file}"),
            1 => format!(
                "{{\"driver\":\"{driver}\",\"node-name\":\"{id}\",\"file\":{{\"driver\":\"file\",\"filename\":\"{file}\"}},\"discard\":\"unmap\"}}"
            ),
            2 => format!(
                "driver=raw,node-name={id},offset=65536,file.driver=file,file.filename=data.raw"
            ),
            3 => format!(
                "driver=raw,node-name={id},offset=512,size=65536,file.driver=file,file.filename=data.raw"
            ),
            4 => format!(
                "driver=throttle,node-name={id},throttle-group=tg,file.driver=raw,file.file.driver=file,file.file.filename=data.raw"
            ),
            5 => format!(
                "driver=copy-on-read,node-name={id},file.driver=qcow2,file.file.driver=file,file.file.filename=cow.qcow2"
            ),
            6 => format!("driver=null-co,node-name={id},size=1048576,read-zeroes=on"),
            7 => format!(
                "driver=qcow2,node-name={id},file.driver=file,file.filename=cow.qcow2,backing.driver=raw,backing.file.driver=file,backing.file.filename=other.raw"
            ),
            _ => format!(
                "driver=file,node-name={id},filename={file},cache.direct=off,auto-read-only=on"
            ),
        };
        if value.contains("throttle-group") {
            self.add("-object throttle-group,id=tg,x-iops-total=1000");
        }
        self.pair("-blockdev", value);
        if !self.one_in(6) {
            let device = self.of(&[
                "virtio-blk-pci",
                "ide-hd",
                "virtio-blk-pci,iothread=io",
                "virtio-blk-pci,share-rw=on",
                "ide-cd",
            ]);
            if device.contains("iothread") {
                self.add("-object iothread,id=io");
            }
            self.pair("-device", format!("{device},drive={id}"));
        }
    }

    fn medium(&mut self) {
        self.spell("medium");
    }

    fn network(&mut self) {
        let (id, port) = (self.id("net"), 20_000 + self.random.below(30_000));
        let card = self.one("network-card");
        let mac = self.of(&["", ",mac=52:54:00:12:34:56", ",romfile=", ",bootindex=3"]);
        let backend = match self.random.below(12) {
            0 => format!("user,id={id},hostfwd=tcp::{port}-:22"),
            1 => format!(
                "user,id={id},net=10.9.0.0/24,dhcpstart=10.9.0.9,dns=10.9.0.3,hostname=h,restrict=on"
            ),
            2 => format!("user,id={id},ipv6=off,tftp=sub,bootfile=x"),
            3 => format!("tap,id={id},script=no,downscript=no,ifname=sptap{}", port % 100),
            4 => format!("socket,id={id},listen=127.0.0.1:{port}"),
            5 => format!("hubport,id={id},hubid=1"),
            6 => format!("user,id={id},guestfwd=tcp:10.0.2.100:1234-null"),
            7 => format!("stream,id={id},server=on,addr.type=unix,addr.path=stream.sock"),
            8 => format!(
                "dgram,id={id},local.type=inet,local.host=127.0.0.1,local.port={port},remote.type=inet,remote.host=127.0.0.1,remote.port=9"
            ),
            9 => format!("socket,id={id},udp=127.0.0.1:9,localaddr=127.0.0.1:{port}"),
            10 => format!(
                "{{\"type\":\"user\",\"id\":\"{id}\",\"hostfwd\":[{{\"str\":\"tcp::{port}-:80\"}}]}}"
            ),
            _ => format!("user,id={id}"),
        };
        match self.random.below(6) {
            0 => {
                self.spell("network-short");
            }
            _ => {
                self.pair("-netdev", backend);
                if card == "usb-net" {
                    self.add("-device qemu-xhci");
                }
                self.pair("-device", format!("{card},netdev={id}{mac}"));
            }
        }
    }

    fn character(&mut self) {
        let id = self.id("c");
        let port = 20_000 + self.random.below(30_000);
        if self.one_in(2) {
            return self.spell("character");
        }
        let backend = match self.random.below(10) {
            0 => format!("socket,id={id},path={id}.sock,server=on,wait=off"),
            1 => format!("file,id={id},path={id}.log,append=on"),
            2 => format!("null,id={id}"),
            3 => format!("ringbuf,id={id},size=4096"),
            4 => format!("pty,id={id}"),
            5 => format!("vc,id={id}"),
            6 => format!(
                "socket,id={id},host=127.0.0.1,port={port},server=on,wait=off,logfile={id}.log"
            ),
            7 => format!("socket,id={id},path=unserved.sock,server=off,reconnect=10"),
            8 => format!("memory,id={id},size=64k"),
            _ => format!("null,id={id},mux=on"),
        };
        self.pair("-chardev", backend);
        let user = self.one("character-user");
        self.add(&user.replace('X', &id));
    }

    fn display(&mut self) {
        self.spell("display");
        if !self.has_display && self.one_in(2) {
            self.has_display = true;
            self.spell("display-shown");
        }
    }

    fn sound(&mut self) {
        let id = self.id("snd");
        let backend = self.of(&["none", "none", "none", "wav,path=sound.wav", "alsa"]);
        if self.one_in(5) {
            let short = self.of(&[
                "-audio none,model=hda",
                "-audio driver=none,model=ac97",
                "-device ac97",
                "-device intel-hda -device hda-output",
                "-audio none",
            ]);
            return self.add(&short);
        }
        self.pair("-audiodev", format!("id={id},driver={backend}"));
        let spelled = self.one("sound").replace('X', &id);
        self.add(&spelled);
    }

    fn usb(&mut self) {
        let hub = self.one("usb-controller");
        self.add(&hub);
        for _ in 0..1 + self.random.below(2) {
            let device = self.one("usb-device");
            self.add(&device);
        }
    }

    fn odd_device(&mut self) {
        self.spell("odd_device");
    }

    /// From QEMU's own list, with properties of their kinds.
    fn any_device(&mut self) {
        let (name, bus) = self.random.pick(&self.tables.devices).clone();
        match bus.as_str() {
            "usb-bus" => self.add("-device qemu-xhci"),
            "SCSI" => self.add("-device virtio-scsi-pci"),
            "virtio-serial-bus" => self.add("-device virtio-serial-pci"),
            "HDA" => self.add("-device intel-hda"),
            _ => {}
        }
        let mut value = name.clone();
        let properties = self.tables.properties(&name);
        for _ in 0..self.random.below(3) {
            if properties.is_empty() {
                break;
            }
            let property = self.random.pick(&properties).clone();
            if let Some(drawn) = property.draw(&mut self.random) {
                value += &format!(",{}={drawn}", property.name);
            }
        }
        self.pair("-device", value);
    }

    /// A parameter of an option as `query-command-line-options` has it.
    fn any_option(&mut self) {
        let names: Vec<&String> = self.tables.options.keys().collect();
        let name = (*self.random.pick(&names)).clone();
        let parameters = self.tables.options[&name].clone();
        // Those need what a random value cannot give, or leave this directory.
        if parameters.is_empty()
            || [
                "incoming",
                "sandbox",
                "add-fd",
                "spice",
                "chardev",
                "trace",
                "readconfig",
                "acpitable",
            ]
            .contains(&name.as_str())
        {
            return self.clock();
        }
        let parameter = self.random.pick(&parameters).clone();
        if let Some(drawn) = parameter.draw(&mut self.random) {
            self.pair(&format!("-{name}"), format!("{}={drawn}", parameter.name));
        }
    }

    fn firmware(&mut self) {
        self.spell("firmware");
    }

    fn numa(&mut self) {
        self.spell("numa");
    }

    fn global(&mut self) {
        self.spell("global");
    }

    fn process(&mut self) {
        self.spell("process");
    }

    fn clock(&mut self) {
        self.spell("clock");
    }

    fn scsi(&mut self) {
        let adapter = self.one("scsi-adapter");
        let id = self.id("sd");
        let (file, format) =
            *self.random.pick(&[("data.raw", "raw"), ("new.qcow2", "qcow2"), ("odd.raw", "raw")]);
        let device = self.of(&[
            "scsi-hd",
            "scsi-cd",
            "scsi-hd,scsi-id=3,lun=1",
            "scsi-hd,rotation_rate=1",
            "scsi-disk",
        ]);
        self.pair("-device", format!("{adapter},id=ctl{id}"));
        self.pair("-drive", format!("file={file},format={format},if=none,id={id}"));
        self.pair("-device", format!("{device},bus=ctl{id}.0,drive={id}"));
    }

    fn bridges(&mut self) {
        self.spell("bridges");
    }

    fn config(&mut self) {
        let file = self.of(&["vm.cfg", "disk.cfg"]);
        self.pair("-readconfig", file);
    }
}
