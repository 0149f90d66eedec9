//! Instruction data: chat templates, record formats, masks, packing. Tests are named by the rows of
//! the checklist they belong to.
#![allow(missing_docs)]

mod bench;
mod chat;
mod errors;
mod formats;
mod masks;
mod packing;
mod pairs;
mod real;
