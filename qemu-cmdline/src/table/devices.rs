//! What QEMU's device models are called, and which it cannot save. Tests ask QEMU for both.

/// Models that QEMU knows by another word too; `-device help` names them as aliases.
const DEVICE_ALIASES: &[(&str, &str)] = &[
    ("ac97", "AC97"),
    ("ahci", "ich9-ahci"),
    ("e1000-82540em", "e1000"),
    ("es1370", "ES1370"),
    ("lsi", "lsi53c895a"),
    ("virtio-9p", "virtio-9p-pci"),
    ("virtio-balloon", "virtio-balloon-pci"),
    ("virtio-blk", "virtio-blk-pci"),
    ("virtio-gpu", "virtio-gpu-pci"),
    ("virtio-gpu-gl", "virtio-gpu-gl-pci"),
    ("virtio-input-host", "virtio-input-host-pci"),
    ("virtio-iommu", "virtio-iommu-pci"),
    ("virtio-keyboard", "virtio-keyboard-pci"),
    ("virtio-mouse", "virtio-mouse-pci"),
    ("virtio-multitouch", "virtio-multitouch-pci"),
    ("virtio-net", "virtio-net-pci"),
    ("virtio-rng", "virtio-rng-pci"),
    ("virtio-scsi", "virtio-scsi-pci"),
    ("virtio-serial", "virtio-serial-pci"),
    ("virtio-sound", "virtio-sound-pci"),
    ("virtio-tablet", "virtio-tablet-pci"),
];

/// The model that a word of `-device` is.
pub fn device_model(word: &str) -> &str {
    DEVICE_ALIASES.iter().find(|(alias, _)| *alias == word).map_or(word, |(_, model)| model)
}

/// QEMU says of these that they are not migratable (`-only-migratable`), 7.2 and 10.0 alike; a test asks it again.
pub const UNMIGRATABLE: &[&str] = &[
    "nvme",
    "rocker",
    "hv-syndbg",
    "usb-audio",
    "usb-braille",
    "usb-mtp",
    "usb-net",
    "usb-serial",
    "usb-uas",
    "usb-wacom-tablet",
    "virtio-input-host",
    "virtio-input-host-pci",
    // Not in 7.2.
    "ufs",
    "virtio-sound",
    "virtio-sound-pci",
];
