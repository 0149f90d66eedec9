//! One head of one sequence is a task. Its keys and values are packed once; then come some tens of queries at a time.

mod packed;
mod passes;

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use self::packed::{Activations, Out, Packed, product};
use super::{AttentionShape, Operands};
use crate::panel::{DEPTH, Kernel, LANES, Path, Tile, tiles};

/// Queries of a block at most: all of its scores stay in the second-level cache for some thousands of keys.
const QUERIES: usize = 64;

/// Scores below which other threads are not asked to help.
const ALONE: usize = 1 << 12;

/// o `[rows x seq, heads x head_dim]`, in zeros of its length. A query that sees nothing gets zeros.
///
/// # Panics
/// Where lengths do not belong together, or the processor lacks the path's instructions.
pub fn forward(path: Path, operands: &Operands, out: &mut [f32]) {
    operands.check();
    assert_eq!(out.len(), operands.q.len());
    let shape = operands.shape;
    let heads = by_heads(out, operands.seq(), shape.heads, shape.head_dim);
    each(operands, heads, |head, mut out| {
        let mut scratch = SCRATCH.take();
        Task::new(path, operands, head).forward(&mut scratch, &mut out);
        SCRATCH.set(scratch);
    });
}

/// dq, dk and dv of do `[rows x seq, heads x head_dim]`, in zeros of their lengths.
///
/// # Panics
/// As [`forward`].
pub fn backward(path: Path, operands: &Operands, upstream: &[f32], gradients: [&mut [f32]; 3]) {
    operands.check();
    let [dq, dk, dv] = gradients;
    assert_eq!([upstream.len(), dq.len()], [operands.q.len(); 2]);
    assert_eq!([dk.len(), dv.len()], [operands.k.len(); 2]);
    let shape = operands.shape;
    if shape.heads == shape.kv_heads {
        return backward_of_heads(path, operands, upstream, [dq, dk, dv]);
    }
    // Heads of one group would add to the same gradients: each gets its own, which are added in order.
    let mut parts = [(); 2].map(|()| vec![0.0; operands.q.len()]);
    let [keys, values] = &mut parts;
    backward_of_heads(path, operands, upstream, [dq, keys, values]);
    let (head_dim, group) = (shape.head_dim, shape.heads / shape.kv_heads);
    for (gradient, part) in [dk, dv].into_iter().zip(parts) {
        let groups = part.par_chunks(group * head_dim);
        let gradients = gradient.par_chunks_mut(head_dim).zip(groups);
        gradients.with_min_len(64).for_each(|(sum, heads)| {
            heads
                .chunks(head_dim)
                .for_each(|head| passes::add(path, sum, head));
        });
    }
}

/// With gradients of keys and values for each head of queries.
fn backward_of_heads(
    path: Path,
    operands: &Operands,
    upstream: &[f32],
    gradients: [&mut [f32]; 3],
) {
    let AttentionShape {
        heads, head_dim, ..
    } = operands.shape;
    let [dq, dk, dv] = gradients.map(|x| by_heads(x, operands.seq(), heads, head_dim));
    let work = dq.into_iter().zip(dk).zip(dv);
    each(operands, work.collect(), |head, ((dq, dk), dv)| {
        let mut scratch = SCRATCH.take();
        Task::new(path, operands, head).backward(&mut scratch, upstream, [dq, dk, dv]);
        SCRATCH.set(scratch);
    });
}

/// Each head of each sequence: row x heads + head, and what it works on.
fn each<T: Send>(operands: &Operands, work: Vec<T>, run: impl Fn(usize, T) + Sync) {
    let seq = operands.seq();
    if work.len() * seq * seq < ALONE {
        work.into_iter()
            .enumerate()
            .for_each(|(i, work)| run(i, work));
    } else {
        let work = work.into_par_iter().enumerate();
        work.with_max_len(1).for_each(|(i, work)| run(i, work));
    }
}

/// For each head of each sequence its part of `[rows x seq, heads x head_dim]`: a slice for each token.
fn by_heads(values: &mut [f32], seq: usize, heads: usize, head_dim: usize) -> Vec<Vec<&mut [f32]>> {
    let mut parts = Vec::new();
    for sequence in values.chunks_mut((seq * heads * head_dim).max(1)) {
        let first = parts.len();
        parts.extend((0..heads).map(|_| Vec::with_capacity(seq)));
        for token in sequence.chunks_mut(heads * head_dim) {
            let heads = parts[first..].iter_mut().zip(token.chunks_mut(head_dim));
            heads.for_each(|(part, head)| part.push(head));
        }
    }
    parts
}

// Kept for the next task: fresh memory costs page faults.
thread_local! {
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// Room for a task.
#[derive(Default)]
struct Scratch {
    /// Keys as they are turned, `[seq, head_dim]`.
    turned: Vec<f32>,
    /// Keys and values: a summand or an output for each token.
    panels: [Packed; 3],
    /// Of a block of queries: queries and do, `[piece of DEPTH][query][DEPTH]`.
    rows: [Vec<f32>; 2],
    /// The same, a summand for each query.
    row_panels: [Packed; 2],
    /// Scores, then weights, of a block of queries; and their gradients.
    scores: [Vec<f32>; 2],
    /// Of each query.
    sums: Vec<f32>,
    /// Sums of a panel.
    kept: Vec<f32>,
}

impl Scratch {
    const fn new() -> Self {
        Self {
            turned: Vec::new(),
            panels: [Packed::new(), Packed::new(), Packed::new()],
            rows: [Vec::new(), Vec::new()],
            row_panels: [Packed::new(), Packed::new()],
            scores: [Vec::new(), Vec::new()],
            sums: Vec::new(),
            kept: Vec::new(),
        }
    }
}

fn grow(buffer: &mut Vec<f32>, length: usize) {
    if buffer.len() < length {
        buffer.resize(length, 0.0);
    }
}

/// One head of one sequence.
struct Task<'a> {
    path: Path,
    kernel: &'static Kernel,
    operands: &'a Operands<'a>,
    row: usize,
    head: usize,
}

/// Some queries of a sequence, and the keys that any of them sees.
struct Block {
    queries: Range<usize>,
    /// What each sees, from `origin` on.
    seen: Vec<Range<usize>>,
    /// What any of them sees, from `origin` on.
    present: Range<usize>,
    /// The key that scores begin with: a multiple of [`DEPTH`].
    origin: usize,
    /// The keys of each piece of scores.
    pieces: Vec<Range<usize>>,
    tiles: Vec<Tile>,
}

impl<'a> Task<'a> {
    fn new(path: Path, operands: &'a Operands<'a>, head: usize) -> Self {
        let heads = operands.shape.heads;
        Self {
            path,
            // Whoever chose the path knows that it is there.
            kernel: path.kernel().expect("a path that this processor can take"),
            operands,
            row: head / heads,
            head: head % heads,
        }
    }

    fn seq(&self) -> usize {
        self.operands.seq()
    }

    fn head_dim(&self) -> usize {
        self.operands.shape.head_dim
    }

    /// This head of a token, of `[rows x seq, heads x head_dim]`.
    fn of_query<'v>(&self, values: &'v [f32], token: usize) -> &'v [f32] {
        let shape = &self.operands.shape;
        let at = (self.row * self.seq() + token) * shape.width() + self.head * shape.head_dim;
        &values[at..][..shape.head_dim]
    }

    /// The head that this one meets, of a token of `[rows x seq, kv_heads x head_dim]`.
    fn of_key<'v>(&self, values: &'v [f32], token: usize) -> &'v [f32] {
        let shape = &self.operands.shape;
        let head = self.head / (shape.heads / shape.kv_heads);
        let at = (self.row * self.seq() + token) * shape.kv_width() + head * shape.head_dim;
        &values[at..][..shape.head_dim]
    }

    /// `factor` x, turned by the angles of a token.
    fn turn(&self, x: &[f32], token: usize, factor: f32, out: &mut [f32]) {
        match self.operands.angles(self.row, token) {
            Some(angles) => passes::turn(self.path, x, angles, false, factor, out),
            None => {
                out.copy_from_slice(x);
                passes::scale(self.path, out, factor);
            }
        }
    }

    /// The gradient of x, from the one of what [`turn`](Self::turn) made of it.
    fn turn_back(&self, gradient: &mut [f32], token: usize, factor: f32, room: &mut [f32]) {
        match self.operands.angles(self.row, token) {
            Some(angles) => {
                let room = &mut room[..gradient.len()];
                room.copy_from_slice(gradient);
                passes::turn(self.path, room, angles, true, factor, gradient);
            }
            None if factor != 1.0 => passes::scale(self.path, gradient, factor),
            None => {}
        }
    }

    /// What queries are multiplied with.
    fn factor(&self) -> f32 {
        (self.head_dim() as f32).powf(-0.5)
    }

    fn turn_keys(&self, turned: &mut Vec<f32>) {
        let width = self.head_dim();
        grow(turned, self.seq() * width);
        for (token, out) in turned.chunks_mut(width).take(self.seq()).enumerate() {
            self.turn(self.of_key(self.operands.k, token), token, 1.0, out);
        }
    }

    fn forward(&self, scratch: &mut Scratch, out: &mut [&mut [f32]]) {
        let (kernel, width) = (self.kernel, self.head_dim());
        self.turn_keys(&mut scratch.turned);
        let [keys, values, _] = &mut scratch.panels;
        let turned = scratch.turned.chunks(width).take(self.seq());
        keys.columns(kernel, width, turned);
        values.rows(
            kernel,
            width,
            self.tokens(|token| self.of_key(self.operands.v, token)),
        );
        for block in self.blocks() {
            self.weigh(&block, scratch);
            let [_, values, _] = &scratch.panels;
            let rows = &mut out[block.queries.clone()];
            let weights = block.activations(&scratch.scores[0]);
            let out = Out {
                rows: &mut *rows,
                origin: 0,
                add: false,
            };
            let room = (&*block.tiles, &mut *scratch.kept);
            product(kernel, weights, values, &block.pieces, 0..width, room, out);
            for (row, sum) in rows.iter_mut().zip(&scratch.sums) {
                let factor = if *sum == 0.0 { 0.0 } else { 1.0 / sum };
                passes::scale(self.path, row, factor);
            }
        }
    }

    /// The weights of a block, not divided by their sums yet. Keys are in the first panels, as outputs.
    fn weigh(&self, block: &Block, scratch: &mut Scratch) {
        let tokens = block.queries.clone();
        let queries = &mut scratch.rows[0];
        self.arrange(queries, tokens.len(), |query, out| {
            let token = tokens.start + query;
            let x = self.of_query(self.operands.q, token);
            self.turn(x, token, self.factor(), out);
        });
        grow(&mut scratch.kept, QUERIES * self.kernel.groups * LANES);
        let [scores, _] = &mut scratch.scores;
        block.multiply(
            self,
            &scratch.rows[0],
            &scratch.panels[0],
            (scores, &mut scratch.kept),
        );
        grow(&mut scratch.sums, QUERIES);
        let sums = &mut scratch.sums[..tokens.len()];
        passes::softmax(self.path, scores, &block.seen, &block.present, sums);
    }

    fn backward(&self, scratch: &mut Scratch, upstream: &[f32], gradients: [Vec<&mut [f32]>; 3]) {
        let [mut dq, mut dk, mut dv] = gradients;
        let (kernel, width) = (self.kernel, self.head_dim());
        self.turn_keys(&mut scratch.turned);
        let [keys, values, key_rows] = &mut scratch.panels;
        let turned = || scratch.turned.chunks(width).take(self.seq());
        keys.columns(kernel, width, turned());
        key_rows.rows(kernel, width, turned());
        values.columns(
            kernel,
            width,
            self.tokens(|token| self.of_key(self.operands.v, token)),
        );
        for block in self.blocks() {
            self.weigh(&block, scratch);
            let tokens = block.queries.clone();
            self.arrange(&mut scratch.rows[1], tokens.len(), |query, out| {
                out.copy_from_slice(self.of_query(upstream, tokens.start + query));
            });
            let [weights, gradients] = &mut scratch.scores;
            let [_, values, key_rows] = &scratch.panels;
            block.multiply(
                self,
                &scratch.rows[1],
                values,
                (gradients, &mut scratch.kept),
            );
            let sums = &scratch.sums[..tokens.len()];
            let (seen, present) = (&block.seen, &block.present);
            passes::scores_gradient(self.path, weights, gradients, seen, present, sums);

            let out = Out {
                rows: &mut dq[tokens.clone()],
                origin: 0,
                add: false,
            };
            let room = (&*block.tiles, &mut *scratch.kept);
            let ds = block.activations(gradients);
            product(kernel, ds, key_rows, &block.pieces, 0..width, room, out);
            let sources = [&scratch.rows[1], &scratch.rows[0]];
            let scores = [&*weights, &*gradients];
            let sums = [&mut dv, &mut dk];
            for (((source, panel), scores), sums) in
                (sources.into_iter().zip(&mut scratch.row_panels))
                    .zip(scores)
                    .zip(sums)
            {
                self.pack(source, tokens.len(), panel);
                block.add_columns(self, scores, panel, &mut scratch.kept, sums);
            }
        }
        let room = &mut scratch.rows[0];
        grow(room, width);
        for (token, (dq, dk)) in dq.iter_mut().zip(&mut dk).enumerate() {
            self.turn_back(dq, token, self.factor(), room);
            self.turn_back(dk, token, 1.0, room);
        }
    }

    /// What `of` makes of each token of the sequence.
    fn tokens<'v>(
        &self,
        of: impl Fn(usize) -> &'v [f32],
    ) -> impl ExactSizeIterator<Item = &'v [f32]> {
        (0..self.seq()).map(of)
    }

    /// Rows of `head_dim` as activations: `[piece of DEPTH][query][DEPTH]`.
    fn arrange(&self, rows: &mut Vec<f32>, count: usize, fill: impl Fn(usize, &mut [f32])) {
        let width = self.head_dim();
        let pieces = width.div_ceil(DEPTH);
        grow(rows, pieces * count * DEPTH);
        if pieces == 1 {
            for (query, row) in rows.chunks_mut(DEPTH).take(count).enumerate() {
                fill(query, &mut row[..width]);
            }
            return;
        }
        let mut whole = vec![0.0; width];
        for query in 0..count {
            fill(query, &mut whole);
            for (piece, values) in whole.chunks(DEPTH).enumerate() {
                rows[(piece * count + query) * DEPTH..][..values.len()].copy_from_slice(values);
            }
        }
    }

    /// The matrix whose summands are the rows that [`arrange`](Self::arrange) laid out.
    fn pack(&self, rows: &[f32], count: usize, panel: &mut Packed) {
        let width = self.head_dim();
        if width <= DEPTH {
            let rows = rows.chunks(DEPTH).take(count).map(|row| &row[..width]);
            return panel.rows(self.kernel, width, rows);
        }
        let mut whole = vec![0.0; count * width];
        for (query, whole) in whole.chunks_mut(width).enumerate() {
            for (piece, values) in whole.chunks_mut(DEPTH).enumerate() {
                let row = &rows[(piece * count + query) * DEPTH..];
                values.copy_from_slice(&row[..values.len()]);
            }
        }
        panel.rows(self.kernel, width, whole.chunks(width));
    }

    /// All queries, some at a time.
    fn blocks(&self) -> impl Iterator<Item = Block> {
        let most = QUERIES / self.kernel.tile * self.kernel.tile;
        let starts = (0..self.seq()).step_by(most);
        starts.map(move |start| self.block(start..self.seq().min(start + most)))
    }

    fn block(&self, queries: Range<usize>) -> Block {
        let spans = queries
            .clone()
            .map(|query| self.operands.span(self.row, query));
        let mut seen: Vec<_> = spans.collect();
        let filled = || seen.iter().filter(|span| !span.is_empty());
        let start = filled().map(|span| span.start).min().unwrap_or(0);
        let end = filled().map(|span| span.end).max().unwrap_or(0);
        let origin = start / DEPTH * DEPTH;
        let present = start - origin..end - origin;
        for span in &mut seen {
            // One that sees nothing begins where all end.
            *span = if Range::is_empty(span) {
                present.end..present.end
            } else {
                span.start - origin..span.end - origin
            };
        }
        let pieces = passes::pieces(&present).map(|(piece, within)| {
            let first = origin + piece * DEPTH;
            first + within.start..first + within.end
        });
        Block {
            pieces: pieces.collect(),
            tiles: tiles(queries.len(), self.kernel.tile),
            queries,
            seen,
            present,
            origin,
        }
    }
}

impl Block {
    /// Scores as activations: keys are summands.
    fn activations<'v>(&self, scores: &'v [f32]) -> Activations<'v> {
        Activations::Rows {
            values: scores,
            tokens: self.queries.len(),
            origin: self.origin,
        }
    }

    /// Products of rows of queries, as [`Task::arrange`] lays them out, with the keys that are present.
    fn multiply(
        &self,
        task: &Task,
        rows: &[f32],
        keys: &Packed,
        (scores, kept): (&mut Vec<f32>, &mut [f32]),
    ) {
        let (count, width) = (self.queries.len(), task.head_dim());
        let lanes = task.kernel.groups * LANES;
        grow(scores, self.present.end.next_multiple_of(DEPTH) * count);
        let dims = passes::pieces(&(0..width));
        let dims: Vec<_> = dims
            .map(|(piece, within)| piece * DEPTH..piece * DEPTH + within.end)
            .collect();
        let activations = Activations::Rows {
            values: rows,
            tokens: count,
            origin: 0,
        };
        for keys_of_piece in &self.pieces {
            let origin = keys_of_piece.start / DEPTH * DEPTH;
            let scores = &mut scores[(origin - self.origin) * count..][..count * DEPTH];
            let mut rows: Vec<_> = scores.chunks_mut(DEPTH).collect();
            let out = Out {
                rows: &mut rows,
                origin,
                add: false,
            };
            // From the panel in which they begin.
            let outputs = keys_of_piece.start / lanes * lanes..keys_of_piece.end;
            let room = (&*self.tiles, &mut *kept);
            product(task.kernel, activations, keys, &dims, outputs, room, out);
        }
    }

    /// Adds to a row of each key the product of its scores with a matrix of a row for each query.
    fn add_columns(
        &self,
        task: &Task,
        scores: &[f32],
        matrix: &Packed,
        kept: &mut Vec<f32>,
        sums: &mut [&mut [f32]],
    ) {
        let (kernel, count) = (task.kernel, self.queries.len());
        grow(kept, DEPTH * kernel.groups * LANES);
        for keys in &self.pieces {
            let first = (keys.start / DEPTH * DEPTH - self.origin) * count + keys.start % DEPTH;
            let out = Out {
                rows: &mut sums[keys.clone()],
                origin: 0,
                add: true,
            };
            product(
                kernel,
                Activations::Columns(&scores[first..]),
                matrix,
                std::slice::from_ref(&(0..count)),
                0..task.head_dim(),
                (&tiles(keys.len(), kernel.tile), kept),
                out,
            );
        }
    }
}
