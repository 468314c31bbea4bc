//! Backing chains of restored disks.
//!
//! Layers are files that many VMs share, and their own headers name backing files of another host.
//! So QEMU never opens a layer by its header alone: the image above it describes the layer and all
//! that is below, as `json:{…}`, in its header. A header holds 1,023 bytes of that. Where a chain
//! is longer, a *link* is put into it: an empty overlay in `--dir` that stands for the layers
//! below, which its own header describes.

use anyhow::{Context, Result, bail};
use checkpoint_format::LayerRef;
use qmp_bridge::disks::ImageFormat;
use qmp_bridge::images::{Backing, ImageSpec, MAX_BACKING_NAME};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use vm::error::damaged;

/// A layer where it is on this host.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub path: String,
    pub format: ImageFormat,
    /// What a reader of it sees, in bytes.
    pub virtual_size: u64,
    /// Its own header names a backing file, which is none of this host's.
    pub names_backing: bool,
}

impl Layer {
    pub(super) fn read(layer: &LayerRef, path: &Path) -> Result<Self> {
        let format = image_format(&layer.format)?;
        let (virtual_size, names_backing) = match format {
            // A length that is no whole number of sectors is rounded up.
            ImageFormat::Raw => (layer.len.0.next_multiple_of(512), false),
            ImageFormat::Qcow2 => read_header(path)
                .with_context(|| format!("reading the header of {}", path.display()))?,
        };
        Ok(Self { path: text(path)?, format, virtual_size, names_backing })
    }
}

/// Virtual size, and whether there is a backing file.
fn read_header(path: &Path) -> Result<(u64, bool)> {
    let mut header = [0; 32];
    let read = File::open(path)?.read_exact_at(&mut header, 0);
    if read.is_err() || !header.starts_with(b"QFI\xfb") {
        return Err(damaged("this layer is no qcow2 image"));
    }
    let long = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap_or_default());
    Ok((long(24), long(8) != 0))
}

/// What a restored image stands on.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// To be made first, in this order.
    pub links: Vec<ImageSpec>,
    pub backing: Option<Backing>,
}

impl Chain {
    /// Links get the names that `link` gives to their numbers.
    pub(super) fn of(layers: &[Layer], link: impl Fn(usize) -> PathBuf) -> Result<Self> {
        let mut chain = Self::default();
        let Some((bottom, above)) = layers.split_last() else { return Ok(chain) };
        let mut below = (describe(bottom, None), bottom);
        for layer in above.iter().rev() {
            if layer.format != ImageFormat::Qcow2 {
                return Err(damaged(format!(
                    "the raw layer {} is on another one, which no raw image can be",
                    layer.path
                )));
            }
            let mut node = describe(layer, Some(&below.0));
            if !fits(&node) {
                let path = link(chain.links.len());
                let linked = json!({ "driver": "qcow2", "file": { "driver": "file", "filename": text(&path)? } });
                let backing = Some(backing(&below.0, below.1)?);
                let spec = ImageSpec {
                    path,
                    format: ImageFormat::Qcow2,
                    virtual_size: below.1.virtual_size,
                    backing,
                    layout: None,
                };
                chain.links.push(spec);
                node = describe(layer, Some(&linked));
            }
            below = (node, layer);
        }
        chain.backing = Some(backing(&below.0, below.1)?);
        Ok(chain)
    }
}

fn describe(layer: &Layer, below: Option<&Value>) -> Value {
    let mut node = json!({ "driver": layer.format.as_str(), "file": { "driver": "file", "filename": layer.path } });
    match below {
        Some(below) => node["backing"] = below.clone(),
        None if layer.names_backing => node["backing"] = Value::Null,
        None => {}
    }
    node
}

fn fits(node: &Value) -> bool {
    name(node).len() <= MAX_BACKING_NAME
}

/// A layer that stands alone goes by its path, as `qemu-img` would write it.
fn name(node: &Value) -> String {
    match (node.get("backing"), node["file"]["filename"].as_str()) {
        (None, Some(path)) => path.to_owned(),
        _ => format!("json:{node}"),
    }
}

fn backing(node: &Value, layer: &Layer) -> Result<Backing> {
    if !fits(node) {
        bail!(
            "the path {} is too long for the header of a qcow2 image; set STILLPOINT_CACHE_DIR or --dir to a shorter one",
            layer.path
        );
    }
    Ok(Backing { file: name(node), format: layer.format })
}

pub(super) fn image_format(name: &str) -> Result<ImageFormat> {
    match name {
        "qcow2" => Ok(ImageFormat::Qcow2),
        "raw" => Ok(ImageFormat::Raw),
        other => Err(damaged(format!("images of format {other} cannot be made"))),
    }
}

fn text(path: &Path) -> Result<String> {
    let path: PathBuf =
        std::path::absolute(path).with_context(|| format!("making {} absolute", path.display()))?;
    path.into_os_string()
        .into_string()
        .map_err(|path| anyhow::anyhow!("the path {path:?} is not valid UTF-8"))
}

#[cfg(test)]
mod test {
    use super::*;

    fn layer(number: usize, format: ImageFormat) -> Layer {
        let path = format!("/var/cache/stillpoint/layers/{number:064}");
        Layer { path, format, virtual_size: 1 << (20 + number % 3), names_backing: true }
    }

    fn layers(count: usize) -> Vec<Layer> {
        let format =
            |number| if number + 1 == count { ImageFormat::Raw } else { ImageFormat::Qcow2 };
        (0..count).map(|number| layer(number, format(number))).collect()
    }

    fn link(number: usize) -> PathBuf {
        format!("/srv/vm/sp-d.link-{number}.qcow2").into()
    }

    /// The layers that QEMU opens, by following names as it does. Checks that the image above every
    /// qcow2 layer describes the backing of that layer.
    fn opened(chain: &Chain) -> Vec<String> {
        let follow = |name: &str| {
            chain
                .links
                .iter()
                .find(|spec| spec.path.to_str() == Some(name))
                .and_then(|spec| spec.backing.clone())
        };
        let mut next = chain.backing.clone().map(|backing| backing.file);
        let mut found = Vec::new();
        while let Some(name) = next.take() {
            assert!(name.len() <= MAX_BACKING_NAME);
            let Some(tree) = name.strip_prefix("json:") else {
                found.push(name);
                break;
            };
            let mut node: Value = serde_json::from_str(tree).unwrap();
            loop {
                let file = node["file"]["filename"].as_str().unwrap().to_owned();
                if let Some(below) = follow(&file) {
                    assert!(
                        node.get("backing").is_none(),
                        "a link's own header says what is below it"
                    );
                    next = Some(below.file);
                    break;
                }
                assert!(
                    node["driver"] != "qcow2" || node.get("backing").is_some(),
                    "{file} would be opened by its own header"
                );
                found.push(file);
                match node.get_mut("backing").map(Value::take) {
                    Some(Value::Object(below)) => node = Value::Object(below),
                    _ => break,
                }
            }
        }
        found
    }

    #[test]
    fn chain_of_any_length_is_opened_layer_by_layer() {
        for count in [0, 1, 2, 3, 7, 8, 40, 256] {
            let layers = layers(count);
            let chain = Chain::of(&layers, link).unwrap();
            assert_eq!(
                opened(&chain),
                layers.iter().map(|layer| layer.path.clone()).collect::<Vec<_>>()
            );
            assert!(
                chain.links.len() <= count / 4,
                "{} links for {count} layers",
                chain.links.len()
            );
            for spec in &chain.links {
                let name = &spec.backing.as_ref().unwrap().file;
                let node: Value =
                    serde_json::from_str(name.trim_start_matches("json:")).unwrap_or_default();
                let path = node["file"]["filename"].as_str().unwrap_or(name);
                let first = layers.iter().find(|layer| layer.path == path).unwrap();
                assert_eq!(
                    spec.virtual_size, first.virtual_size,
                    "a link is as large as what it stands for"
                );
            }
        }
    }

    #[test]
    fn single_layer_goes_by_its_path_unless_its_header_names_another() {
        let alone = |names_backing| {
            let layer = Layer { names_backing, ..layer(0, ImageFormat::Qcow2) };
            Chain::of(&[layer], link).unwrap().backing.unwrap().file
        };
        assert!(alone(false).starts_with('/'));
        assert!(alone(true).contains(r#""backing":null"#));
    }

    #[test]
    fn impossible_chains_are_errors() {
        let long = Layer { path: format!("/{}", "x".repeat(1200)), ..layer(0, ImageFormat::Qcow2) };
        assert!(Chain::of(&[long.clone(), layer(1, ImageFormat::Raw)], link).is_err());
        assert!(Chain::of(&[layer(0, ImageFormat::Raw), long], link).is_err());
        let error =
            Chain::of(&[layer(0, ImageFormat::Raw), layer(1, ImageFormat::Raw)], link).unwrap_err();
        assert_eq!(vm::error::class_of(&error), vm::error::Class::Damaged);
    }
}
