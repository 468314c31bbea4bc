//! A store in memory: the reference for what the others must do, and the fast one for tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use crate::error::{Op, Result, StoreError};
use crate::local::check_range_len;
use crate::path::StorePath;
use crate::store::{Entry, PutOptions, PutReceipt, Stat, Store};

#[derive(Debug, Clone)]
enum Node {
    Dir { modified: SystemTime },
    File { data: Bytes, replicas: Option<u16>, modified: SystemTime },
}

impl Node {
    fn dir() -> Self {
        Node::Dir { modified: SystemTime::now() }
    }
}

type Tree = BTreeMap<StorePath, Node>;

/// An entry was added to the directory that holds `path`, or removed: sets its modification time.
fn touch_parent(tree: &mut Tree, path: &StorePath) {
    if let Some(Node::Dir { modified }) =
        tree.get_mut(&path.parent().unwrap_or_else(StorePath::root))
    {
        *modified = SystemTime::now();
    }
}

/// A tree in memory. Clones share it.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    tree: Arc<Mutex<Tree>>,
    default_replicas: Option<u16>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        let tree = Tree::from([(StorePath::root(), Node::dir())]);
        MemoryStore { tree: Arc::new(Mutex::new(tree)), default_replicas: None }
    }

    /// An empty store that reports `default` replicas of each file, as HDFS does.
    pub fn with_replicas(default: u16) -> Self {
        MemoryStore { default_replicas: Some(default), ..Self::new() }
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        // No operation leaves the tree half changed, so a panic elsewhere does not spoil it.
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, op: Op, path: &StorePath, node: Node) -> Result<()> {
        let mut tree = self.tree();
        if tree.contains_key(path) {
            return Err(StoreError::already_exists(op, path));
        }
        let parent = path.parent().unwrap_or_else(StorePath::root);
        match tree.get(&parent) {
            Some(Node::Dir { .. }) => {}
            Some(Node::File { .. }) => {
                return Err(StoreError::failed(op, path, "its parent is a file"));
            }
            None => return Err(StoreError::not_found(op, path)),
        }
        tree.insert(path.clone(), node);
        touch_parent(&mut tree, path);
        Ok(())
    }

    fn add_file(
        &self,
        op: Op,
        path: &StorePath,
        data: Bytes,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        let len = data.len() as u64;
        let replicas = self.default_replicas.map(|default| options.replicas.unwrap_or(default));
        self.add(op, path, Node::File { data, replicas, modified: SystemTime::now() })?;
        Ok(PutReceipt { len, replicas })
    }

    fn file(&self, op: Op, path: &StorePath) -> Result<Bytes> {
        match self.tree().get(path) {
            Some(Node::File { data, .. }) => Ok(data.clone()),
            Some(Node::Dir { .. }) => Err(StoreError::failed(op, path, "it is a directory")),
            None => Err(StoreError::not_found(op, path)),
        }
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn url(&self) -> &str {
        "memory:"
    }

    async fn create_dir_all(&self, path: &StorePath) -> Result<()> {
        if let Some(parent) = path.parent() {
            self.create_dir_all(&parent).await?;
        }
        match self.add(Op::CreateDirAll, path, Node::dir()) {
            Err(error)
                if error.is_already_exists()
                    && matches!(self.tree().get(path), Some(Node::Dir { .. })) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    async fn create_dir(&self, path: &StorePath) -> Result<()> {
        self.add(Op::CreateDir, path, Node::dir())
    }

    async fn put(
        &self,
        path: &StorePath,
        data: Vec<Bytes>,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        self.add_file(Op::Put, path, joined(data), options)
    }

    async fn put_exclusive(
        &self,
        path: &StorePath,
        data: Bytes,
        options: PutOptions,
    ) -> Result<PutReceipt> {
        self.add_file(Op::PutExclusive, path, data, options)
    }

    async fn read(&self, path: &StorePath, limit: u64) -> Result<Bytes> {
        let data = self.file(Op::Read, path)?;
        if data.len() as u64 > limit {
            return Err(StoreError::Limit {
                path: path.to_string(),
                what: "its length",
                actual: data.len() as u64,
                limit,
            });
        }
        Ok(data)
    }

    async fn read_range(&self, path: &StorePath, offset: u64, len: u64) -> Result<Bytes> {
        check_range_len(path, len)?;
        let data = self.file(Op::ReadRange, path)?;
        let file_len = data.len() as u64;
        match offset.checked_add(len) {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "within the length of something in memory"
            )]
            Some(end) if end <= file_len => Ok(data.slice(offset as usize..end as usize)),
            _ => Err(StoreError::PastEnd { path: path.to_string(), offset, len, file_len }),
        }
    }

    async fn stat(&self, path: &StorePath) -> Result<Option<Stat>> {
        Ok(self.tree().get(path).map(|node| match node {
            Node::Dir { modified } => {
                Stat { len: 0, is_dir: true, replicas: None, modified: *modified }
            }
            Node::File { data, replicas, modified } => Stat {
                len: data.len() as u64,
                is_dir: false,
                replicas: *replicas,
                modified: *modified,
            },
        }))
    }

    async fn list(&self, path: &StorePath) -> Result<Vec<Entry>> {
        let tree = self.tree();
        match tree.get(path) {
            Some(Node::Dir { .. }) => {}
            Some(Node::File { .. }) => {
                return Err(StoreError::failed(Op::List, path, "it is a file"));
            }
            None => return Err(StoreError::not_found(Op::List, path)),
        }
        let children = tree.iter().filter(|(child, _)| child.parent().as_ref() == Some(path));
        let mut entries: Vec<Entry> = children.map(|(child, node)| entry(child, node)).collect();
        entries.sort();
        Ok(entries)
    }

    async fn rename_dir(&self, from: &StorePath, to: &StorePath) -> Result<()> {
        let op = Op::RenameDir;
        let mut tree = self.tree();
        let parent = to.parent().unwrap_or_else(StorePath::root);
        if !matches!(tree.get(from), Some(Node::Dir { .. }))
            || !matches!(tree.get(&parent), Some(Node::Dir { .. }))
        {
            return Err(StoreError::not_found(op, from));
        }
        if tree.contains_key(to) {
            return Err(StoreError::already_exists(op, to));
        }
        if from.is_root() || to.is_within(from) {
            return Err(StoreError::failed(op, from, "a directory can't move into itself"));
        }
        let moved: Vec<StorePath> =
            tree.keys().filter(|path| path.is_within(from)).cloned().collect();
        for old in moved {
            let new = StorePath::new(&format!("{to}{}", &old.as_str()[from.as_str().len()..]))?;
            if let Some(node) = tree.remove(&old) {
                tree.insert(new, node);
            }
        }
        touch_parent(&mut tree, from);
        touch_parent(&mut tree, to);
        Ok(())
    }

    async fn remove(&self, path: &StorePath) -> Result<()> {
        if path.is_root() {
            return Err(StoreError::failed(Op::Remove, path, "a store never removes its root"));
        }
        let mut tree = self.tree();
        let before = tree.len();
        tree.retain(|other, _| !other.is_within(path));
        if tree.len() < before {
            touch_parent(&mut tree, path);
        }
        Ok(())
    }

    async fn set_replication(&self, path: &StorePath, wanted: u16) -> Result<()> {
        match self.tree().get_mut(path) {
            Some(Node::File { replicas, .. }) => {
                *replicas = replicas.map(|_| wanted);
                Ok(())
            }
            _ => Err(StoreError::not_found(Op::SetReplication, path)),
        }
    }
}

fn joined(mut data: Vec<Bytes>) -> Bytes {
    if data.len() == 1 {
        return data.swap_remove(0);
    }
    let mut all = BytesMut::with_capacity(data.iter().map(Bytes::len).sum());
    for chunk in data {
        all.extend_from_slice(&chunk);
    }
    all.freeze()
}

fn entry(path: &StorePath, node: &Node) -> Entry {
    let (is_dir, len) = match node {
        Node::Dir { .. } => (true, 0),
        Node::File { data, .. } => (false, data.len() as u64),
    };
    Entry { name: path.name().to_owned(), is_dir, len }
}
