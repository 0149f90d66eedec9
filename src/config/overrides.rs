//! `--set a.b=v`: edits of the document from the command line.
//!
//! A path names keys and, inside lists, positions from 0: `data.datasets.0.path`. Tables that are
//! missing on the way are created; the position after the last appends.

use super::document::{Entry, Node, Table, Value, parse_override};
use super::error::Issue;
use super::source::Origin;

/// One key or position of a path, with its range in the argument.
struct Segment<'a> {
    name: &'a str,
    end: usize,
}

/// A path that is being followed.
struct Edit<'a> {
    index: usize,
    argument: &'a str,
    segments: Vec<Segment<'a>>,
}

/// Applies the `index`-th `--set` argument.
pub(super) fn apply(root: &mut Table, index: usize, argument: &str) -> Result<(), Issue> {
    let malformed = |message: String| Issue {
        message,
        origin: Some(Origin::Set {
            index,
            span: 0..argument.len(),
        }),
        help: Some("write --set section.key=value, as in --set train.max_steps=100".to_string()),
    };
    let Some((path, text)) = argument.split_once('=') else {
        return Err(malformed("--set without a `=`".to_string()));
    };
    let mut segments = Vec::new();
    let mut start = 0;
    for part in path.split('.') {
        let name = part.trim();
        if name.is_empty() {
            return Err(malformed("--set with an empty key".to_string()));
        }
        let end = start + part.trim_end().len();
        segments.push(Segment { name, end });
        start += part.len() + 1;
    }
    if segments.len() > MAX_DEPTH {
        return Err(malformed(format!(
            "--set with a path of {} keys",
            segments.len()
        )));
    }
    let leading = text.len() - text.trim_start().len();
    let node = parse_override(text.trim(), index, path.len() + 1 + leading);
    let edit = Edit {
        index,
        argument,
        segments,
    };
    edit.in_table(root, 0, node)
}

/// Far deeper than any key; keeps a hostile argument from exhausting the stack.
const MAX_DEPTH: usize = 64;

impl Edit<'_> {
    /// Follows the path from its `at`-th segment, a key of `table`.
    fn in_table(&self, table: &mut Table, at: usize, node: Node) -> Result<(), Issue> {
        let name = self.segments[at].name;
        let position = table.entries.iter().position(|entry| entry.key == name);
        let position = position.unwrap_or_else(|| {
            table.entries.push(Entry {
                key: name.to_string(),
                key_origin: self.origin(at),
                node: self.empty(at),
            });
            table.entries.len() - 1
        });
        let entry = &mut table.entries[position];
        if at + 1 == self.segments.len() {
            entry.key_origin = self.origin(at);
            entry.node = node;
            return Ok(());
        }
        self.in_node(&mut entry.node, at + 1, node)
    }

    /// Follows the path from its `at`-th segment, a key or position inside `parent`.
    fn in_node(&self, parent: &mut Node, at: usize, node: Node) -> Result<(), Issue> {
        match &mut parent.value {
            Value::Table(table) => self.in_table(table, at, node),
            Value::Array(items) => self.in_array(items, at, node),
            _ => Err(self.issue(
                at,
                format!(
                    "`{}` is neither a section nor a list",
                    self.path(at - 1).escape_debug()
                ),
                None,
            )),
        }
    }

    fn in_array(&self, items: &mut Vec<Node>, at: usize, node: Node) -> Result<(), Issue> {
        let list = self.path(at - 1).escape_debug().to_string();
        let Ok(position) = self.segments[at].name.parse::<usize>() else {
            return Err(self.issue(
                at,
                format!("`{list}` is a list: its elements are numbered"),
                Some(format!("the first is `{list}.0`")),
            ));
        };
        if position > items.len() {
            return Err(self.issue(
                at,
                format!("`{list}` has {} elements, counted from 0", items.len()),
                Some(format!("`{list}.{}` appends one", items.len())),
            ));
        }
        if position == items.len() {
            items.push(self.empty(at));
        }
        if at + 1 == self.segments.len() {
            items[position] = node;
            return Ok(());
        }
        self.in_node(&mut items[position], at + 1, node)
    }

    /// What the path needs at a place where nothing is yet: a list before a number, else a table.
    fn empty(&self, at: usize) -> Node {
        let next = self.segments.get(at + 1);
        let value = match next.map(|segment| segment.name.parse::<usize>()) {
            Some(Ok(_)) => Value::Array(Vec::new()),
            _ => Value::Table(Table::default()),
        };
        Node {
            origin: self.origin(at),
            value,
        }
    }

    fn path(&self, at: usize) -> &str {
        &self.argument[..self.segments[at].end]
    }

    fn origin(&self, at: usize) -> Origin {
        Origin::Set {
            index: self.index,
            span: 0..self.segments[at].end,
        }
    }

    fn issue(&self, at: usize, message: String, help: Option<String>) -> Issue {
        Issue {
            message,
            origin: Some(self.origin(at)),
            help,
        }
    }
}
