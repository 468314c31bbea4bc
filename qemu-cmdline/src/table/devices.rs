//! What QEMU's device models are called. A test asks QEMU.

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

/// Whether one of `names` is that of the model; a name that ends in `*` stands for all that begin
/// so.
pub(crate) fn matches(names: &[&str], model: &str) -> bool {
    names.iter().any(|name| match name.strip_suffix('*') {
        Some(family) => model.starts_with(family),
        None => *name == model,
    })
}

/// Options other than `-device` that make a device below `/machine/peripheral` or
/// `/machine/peripheral-anon`: its id, if it gets one, and its model; empty for any.
pub const SHORTHANDS: &[(&str, Option<&str>, &str)] = &[
    ("virtfs", None, "virtio-9p-pci"),
    ("debugcon", Some("debugcon"), "isa-debugcon"),
    ("watchdog", None, ""),
];

/// The model that `-audio model=` makes, where it is one that cannot be saved.
pub fn audio_model(word: &str) -> &str {
    match word {
        "virtio" => "virtio-sound-pci",
        word => word,
    }
}
