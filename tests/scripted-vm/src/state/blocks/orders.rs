//! What is ordered of disks.

use std::net::Shutdown;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use super::{Bitmap, Blocks, Export, Job, Node, text};
use crate::State;
use crate::state::migration::unknown;
use crate::state::{Refusal, Reply};

fn refuse<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::generic(why))
}

impl State {
    pub(crate) fn block_command(&mut self, command: &str, arguments: &Value) -> Reply {
        if let Some(answer) = self.blocks.query(command) {
            return Ok(answer);
        }
        match command {
            "query-migrate" => return Ok(self.query_migrate()),
            "query-migrate-capabilities" => {
                let row =
                    |(name, state): (&String, &bool)| json!({ "capability": name, "state": state });
                return Ok(self.capabilities.iter().map(row).collect());
            }
            "query-migrate-parameters" => return Ok(json!(self.parameters)),
            "blockdev-set-active" if self.version.major >= 10 => self.blocks.is_active = true,
            "blockdev-add" => return self.blockdev_add(arguments),
            "nbd-server-start" => return self.nbd_server_start(arguments),
            "nbd-server-stop" => return self.blocks.nbd_server_stop(),
            "qom-set" => {
                return self.blocks.set_drive(text(arguments, "path"), text(arguments, "value"));
            }
            _ => return self.blocks.order(command, arguments),
        }
        Ok(json!({}))
    }

    fn blockdev_add(&mut self, options: &Value) -> Reply {
        let (name, driver) = (text(options, "node-name"), text(options, "driver"));
        if self.blocks.node(name).is_some() {
            return refuse(format!("Duplicate nodes with node-name='{name}'"));
        }
        let mut node = Node { name: name.to_owned(), driver: driver.to_owned(), ..Node::default() };
        for edge in ["file", "backing", "target"] {
            if let Some(child) = options[edge].as_str() {
                if self.blocks.node(child).is_none() {
                    return refuse(format!("Cannot find device='' nor node-name='{child}'"));
                }
                node.children.push((edge, child.to_owned()));
            }
        }
        match driver {
            "file" => {
                text(options, "filename").clone_into(&mut node.filename);
                let file = self.open_set(&node.filename)?;
                let bytes = file.metadata().map_or(0, |facts| facts.len());
                node.data = vec![0; usize::try_from(bytes).expect("small")];
            }
            "qcow2" => {
                let file = node.child("file").unwrap_or_default();
                let bytes = self.blocks.sizes.get(file).copied().unwrap_or_default();
                node.data = vec![0; usize::try_from(bytes).expect("small")];
            }
            "copy-before-write" | "snapshot-access" => {}
            other => {
                let why = format!("Parameter 'driver' does not accept value '{other}'");
                return refuse(why);
            }
        }
        self.blocks.nodes.push(node);
        Ok(json!({}))
    }

    fn nbd_server_start(&mut self, arguments: &Value) -> Reply {
        if self.blocks.server.is_some() {
            return refuse("NBD server already running");
        }
        let name = text(&arguments["addr"]["data"], "str");
        let Some(fd) = self.fds.remove(name) else {
            return refuse(format!("File descriptor named '{name}' has not been found"));
        };
        self.blocks.server = Some(UnixListener::from(fd));
        self.serves_nbd = true;
        Ok(json!({}))
    }
}

impl Blocks {
    fn order(&mut self, command: &str, arguments: &Value) -> Reply {
        match command {
            "blockdev-del" => return self.delete(text(arguments, "node-name")),
            "blockdev-create" => {
                let options = &arguments["options"];
                let bytes = options["size"].as_u64().unwrap_or_default();
                self.sizes.insert(text(options, "file").to_owned(), bytes);
                let id = text(arguments, "job-id").to_owned();
                self.jobs.push(Job {
                    id,
                    kind: "create",
                    status: "concluded",
                    error: None,
                    node: None,
                });
            }
            "job-dismiss" | "job-cancel" => {
                return self.end_job(text(arguments, "id"), "GenericError", "Job not found");
            }
            "block-job-cancel" => {
                let id = text(arguments, "device");
                return self.end_job(id, "DeviceNotActive", &format!("Block job '{id}' not found"));
            }
            "block-export-add" => return self.export(arguments),
            "block-export-del" => {
                let id = text(arguments, "id");
                let Some(at) = self.exports.iter().position(|export| export.id == id) else {
                    return refuse(format!("Export '{id}' is not found"));
                };
                self.exports.remove(at);
                for (_, client) in self.clients.extract_if(.., |(export, _)| export == id) {
                    let _ = client.shutdown(Shutdown::Both);
                }
            }
            "block-dirty-bitmap-add" => {
                return self.act(&json!({ "type": command, "data": arguments }));
            }
            "transaction" => return self.transaction(&arguments["actions"]),
            _ => return Err(unknown(command)),
        }
        Ok(json!({}))
    }

    fn end_job(&mut self, id: &str, class: &'static str, why: &str) -> Reply {
        match self.jobs.iter().position(|job| job.id == id) {
            Some(at) => drop(self.jobs.remove(at)),
            None => return Err(Refusal { class, description: why.to_owned() }),
        }
        Ok(json!({}))
    }

    fn delete(&mut self, name: &str) -> Reply {
        let Some(at) = self.nodes.iter().position(|node| node.name == name) else {
            return refuse(format!("Failed to find node with node-name='{name}'"));
        };
        let above =
            self.nodes.iter().any(|node| node.children.iter().any(|(_, child)| child == name));
        let is_used = above
            || self.drives.iter().any(|drive| drive.node.as_deref() == Some(name))
            || self.exports.iter().any(|export| export.node == name)
            || self.jobs.iter().any(|job| job.node.as_deref() == Some(name));
        if is_used {
            return refuse(format!("Node {name} is in use"));
        }
        self.nodes.remove(at);
        Ok(json!({}))
    }

    fn export(&mut self, arguments: &Value) -> Reply {
        let (id, node) = (text(arguments, "id"), text(arguments, "node-name"));
        if self.node(node).is_none() {
            return refuse(format!("Cannot find device='' nor node-name='{node}'"));
        }
        if self.exports.iter().any(|export| export.id == id) {
            return refuse(format!("Block export id '{id}' is already in use"));
        }
        if self.server.is_none() {
            return refuse("NBD server not running");
        }
        let mut bitmaps = Vec::new();
        for given in arguments["bitmaps"].as_array().into_iter().flatten() {
            let (of, name) = match given.as_str() {
                Some(name) => (self.holder(node, name), name),
                None => (Some(text(given, "node").to_owned()), text(given, "name")),
            };
            match of.filter(|of| self.bitmap(of, name).is_some()) {
                Some(of) => bitmaps.push((of, name.to_owned())),
                None => return refuse(format!("Bitmap '{name}' is not found")),
            }
        }
        // A side effect that QEMU before 10.0 has.
        self.is_active = true;
        self.exports.push(Export {
            id: id.to_owned(),
            name: text(arguments, "name").to_owned(),
            node: node.to_owned(),
            is_writable: arguments["writable"] == true,
            bitmaps,
            has_depth: arguments["allocation-depth"] == true,
        });
        Ok(json!({}))
    }

    /// The node of a backing chain that has this bitmap.
    fn holder(&self, node: &str, bitmap: &str) -> Option<String> {
        let node = self.node(node)?;
        match node.bitmaps.iter().any(|own| own.name == bitmap) {
            true => Some(node.name.clone()),
            false => self.holder(node.child("backing").or(node.child("file"))?, bitmap),
        }
    }

    pub(super) fn nbd_server_stop(&mut self) -> Reply {
        let Some(listener) = self.server.take() else { return refuse("NBD server not running") };
        // Its thread is waiting in accept(2).
        let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
        self.exports.clear();
        self.disconnect();
        Ok(json!({}))
    }

    pub(crate) fn listener(&self) -> Option<UnixListener> {
        self.server.as_ref().map(|server| server.try_clone().expect("a socket"))
    }

    /// A device gets another node; a filter's instant begins.
    fn set_drive(&mut self, path: &str, node: &str) -> Reply {
        if self.node(node).is_none() {
            return refuse(format!("Cannot find device='' nor node-name='{node}'"));
        }
        let Some(drive) = self.drives.iter_mut().find(|drive| drive.qdev == path) else {
            return Err(Refusal {
                class: "DeviceNotFound",
                description: format!("Device '{path}' not found"),
            });
        };
        drive.node = Some(node.to_owned());
        let below = self.node(node).filter(|node| node.driver == "copy-before-write");
        if let Some(content) =
            below.and_then(|filter| self.content(filter.child("file")?)).map(<[u8]>::to_vec)
        {
            let filter = self.nodes.iter_mut().find(|other| other.name == node).expect("found");
            filter.snapshot = Some(content);
        }
        Ok(json!({}))
    }

    /// All or nothing.
    fn transaction(&mut self, actions: &Value) -> Reply {
        let before = (self.nodes.clone(), self.jobs.clone());
        for action in actions.as_array().into_iter().flatten() {
            if let Err(error) = self.act(action) {
                (self.nodes, self.jobs) = before;
                return Err(error);
            }
        }
        Ok(json!({}))
    }

    fn act(&mut self, action: &Value) -> Reply {
        let (kind, data) = (text(action, "type"), &action["data"]);
        if kind == "blockdev-backup" {
            return self.backup(data);
        }
        let (node, name) = (text(data, "node"), text(data, "name"));
        let merged = self.merged(data)?;
        let Some(node) = self.nodes.iter_mut().find(|other| other.name == node) else {
            return refuse(format!("Cannot find device='{node}' nor node-name='{node}'"));
        };
        if kind == "block-dirty-bitmap-add" {
            if node.bitmaps.iter().any(|bitmap| bitmap.name == name) {
                return refuse(format!("Bitmap already exists: {name}"));
            }
            let granularity = data["granularity"].as_u64().unwrap_or(65_536);
            node.bitmaps.push(Bitmap::new(name, granularity, data["disabled"] != true));
            return Ok(json!({}));
        }
        let name = if kind == "block-dirty-bitmap-merge" { text(data, "target") } else { name };
        let Some(at) = node.bitmaps.iter().position(|bitmap| bitmap.name == name) else {
            return refuse(format!("Dirty bitmap '{name}' not found"));
        };
        match kind {
            "block-dirty-bitmap-enable" => node.bitmaps[at].is_recording = true,
            "block-dirty-bitmap-disable" => node.bitmaps[at].is_recording = false,
            "block-dirty-bitmap-remove" => drop(node.bitmaps.remove(at)),
            "block-dirty-bitmap-merge" => {
                merged.iter().for_each(|from| node.bitmaps[at].merge(from))
            }
            other => return refuse(format!("Parameter 'type' does not accept value '{other}'")),
        }
        Ok(json!({}))
    }

    /// The bitmaps that an action merges.
    fn merged(&self, data: &Value) -> Result<Vec<Bitmap>, Refusal> {
        let mut found = Vec::new();
        for given in data["bitmaps"].as_array().into_iter().flatten() {
            let (node, name) = match given.as_str() {
                Some(name) => (text(data, "node"), name),
                None => (text(given, "node"), text(given, "name")),
            };
            match self.bitmap(node, name) {
                Some(bitmap) => found.push(bitmap.clone()),
                None => return refuse(format!("Dirty bitmap '{name}' not found")),
            }
        }
        Ok(found)
    }

    fn backup(&mut self, data: &Value) -> Reply {
        if !self.is_active {
            return refuse("Block node is inactive");
        }
        let (disk, target) = (text(data, "device"), text(data, "target"));
        let Some(content) = self.content(disk).map(<[u8]>::to_vec) else {
            return refuse(format!("Cannot find device='{disk}' nor node-name='{disk}'"));
        };
        let Some(overlay) = self.nodes.iter_mut().find(|node| node.name == target) else {
            return refuse(format!("Cannot find device='{target}' nor node-name='{target}'"));
        };
        overlay.snapshot = Some(content);
        self.jobs.push(Job {
            id: text(data, "job-id").to_owned(),
            kind: "backup",
            status: "running",
            error: None,
            node: Some(target.to_owned()),
        });
        Ok(json!({}))
    }
}
