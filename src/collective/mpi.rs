//! Ranks that are processes, which MPI starts and connects.
//!
//! MPI's own collective operations wait for ever for a rank that does not come, do not say which it
//! is, and add in an order of their own. Messages between every two ranks have none of these faults.
//! MPI's objects stay on one thread of their own, which the others ask.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::request::{LocalScope, Request, scope};
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::{Destination, Source};

use super::messages::{self, Messages, Outgoing, What};
use super::{Collective, CollectiveError};

/// One rank of a group of processes. When it is dropped, MPI is shut down, which waits for the other
/// ranks to do the same; if it is dropped by a panic, all ranks are ended.
#[derive(Debug)]
pub struct MpiRank {
    rank: usize,
    ranks: usize,
    timeout: Duration,
    calls: Mutex<Option<Sender<Call>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What the thread of MPI is asked.
#[derive(Debug)]
enum Call {
    Exchange {
        what: What,
        outgoing: Outgoing,
        timeout: Duration,
        answer: SyncSender<Answer>,
    },
    Abort(i32),
}

/// What each rank sent, or why that is not known.
type Answer = Result<Vec<Vec<u8>>, String>;

impl MpiRank {
    /// Joins the group that this process was started in. A rank waits for the others for at most
    /// `timeout` in each exchange.
    ///
    /// # Errors
    /// MPI has been initialised before, in this process.
    pub fn join(timeout: Duration) -> Result<Self, CollectiveError> {
        let (calls, receiver) = channel();
        let (say, hear) = sync_channel(1);
        let thread = std::thread::spawn(move || {
            // This thread alone calls MPI.
            let joined = mpi::initialize_with_threading(Threading::Funneled);
            let place = joined.as_ref().map(|(universe, _)| {
                let world = universe.world();
                [world.rank(), world.size()]
            });
            // If nobody hears it, nobody will ask either.
            let _ = say.send(place);
            if let Some((universe, _)) = joined {
                serve(&universe.world(), &receiver);
            }
        });
        let Ok(Some([rank, ranks])) = hear.recv() else {
            return Err(CollectiveError {
                rank: 0,
                reason: "MPI cannot be initialised, or has been before".to_string(),
            });
        };
        Ok(Self {
            rank: usize::try_from(rank).unwrap_or_default(),
            ranks: usize::try_from(ranks).unwrap_or(1),
            timeout,
            calls: Mutex::new(Some(calls)),
            thread: Some(thread),
        })
    }

    fn call(&self, call: Call) -> bool {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.as_ref().is_some_and(|calls| calls.send(call).is_ok())
    }

    fn error(&self, reason: String) -> CollectiveError {
        CollectiveError {
            rank: self.rank,
            reason,
        }
    }
}

impl Drop for MpiRank {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Exit code of a Rust program that panics.
            self.abandon(101);
        }
        let calls = self.calls.get_mut().unwrap_or_else(PoisonError::into_inner);
        drop(calls.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Messages for MpiRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn exchange(&self, what: What, outgoing: Outgoing) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let (answer, hear) = sync_channel(1);
        let timeout = self.timeout;
        let is_heard = self.call(Call::Exchange {
            what,
            outgoing,
            timeout,
            answer,
        });
        let answer = match is_heard {
            true => hear.recv().ok(),
            false => None,
        };
        let over = || Err("an earlier exchange has failed".to_string());
        answer
            .unwrap_or_else(over)
            .map_err(|reason| self.error(reason))
    }
}

impl Collective for MpiRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn sum(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        messages::sum(self, What::Sum, values)
    }

    fn sum_gradient(&self, _path: &str, values: &mut [f32]) -> Result<(), CollectiveError> {
        messages::sum(self, What::SumOfGradient, values)
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        self.exchange(What::Gather, Outgoing::Same(bytes))
    }

    fn collect(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let mut each = vec![Vec::new(); self.ranks];
        each[0] = bytes;
        self.exchange(What::Collect, Outgoing::Each(each))
    }

    fn abandon(&self, code: i32) {
        if self.call(Call::Abort(code)) {
            // The thread of MPI ends the process.
            std::thread::sleep(Duration::from_secs(10));
        }
    }
}

/// Answers calls until nobody can call any more.
fn serve(world: &SimpleCommunicator, calls: &Receiver<Call>) {
    let mut number = 0;
    for call in calls {
        match call {
            Call::Abort(code) => world.abort(code),
            Call::Exchange {
                what,
                outgoing,
                timeout,
                answer,
            } => {
                number += 1;
                let meeting = Meeting {
                    world,
                    calls,
                    answer: &answer,
                    deadline: Instant::now() + timeout,
                    timeout,
                };
                let found = meeting.exchange([number, what as u64], &outgoing);
                let _ = answer.send(found);
            }
        }
    }
}

/// One exchange.
struct Meeting<'a> {
    world: &'a SimpleCommunicator,
    calls: &'a Receiver<Call>,
    answer: &'a SyncSender<Answer>,
    deadline: Instant,
    timeout: Duration,
}

/// The first message to each rank: number and purpose of the exchange, the length of what is to be
/// sent, and its beginning. Most exchanges of a step need no second one.
const HEAD: usize = 256;
const FIELDS: usize = 24;
const INLINE: usize = HEAD - FIELDS;

/// Most bytes of one message: MPI counts them in 31 bits.
const MOST: usize = 1 << 30;

impl Meeting<'_> {
    fn exchange(&self, [number, what]: [u64; 2], outgoing: &Outgoing) -> Answer {
        let (rank, ranks) = (self.world.rank(), self.world.size());
        let others: Vec<i32> = (0..ranks).filter(|other| *other != rank).collect();
        let heads: Vec<Vec<u8>> = others
            .iter()
            .map(|other| {
                let message = outgoing.to(*other as usize);
                let mut head = vec![0; HEAD];
                let fields = [number, what, message.len() as u64];
                for (place, field) in head.chunks_mut(8).zip(fields) {
                    place.copy_from_slice(&field.to_le_bytes());
                }
                let inline = message.len().min(INLINE);
                head[FIELDS..FIELDS + inline].copy_from_slice(&message[..inline]);
                head
            })
            .collect();
        let mut arrived = vec![vec![0; HEAD]; others.len()];
        let sent = others.iter().zip(&heads);
        self.pass(
            sent.map(|(other, head)| (*other, head.as_slice())),
            others
                .iter()
                .copied()
                .zip(arrived.iter_mut().map(Vec::as_mut_slice)),
        );

        let mut found = Vec::new();
        for (other, head) in others.iter().zip(&arrived) {
            let (fields, _) = head[..FIELDS].as_chunks();
            let fields: Vec<u64> = fields
                .iter()
                .map(|field| u64::from_le_bytes(*field))
                .collect();
            if fields[..2] != [number, what] {
                return Err(format!("rank {other} came to another exchange"));
            }
            let len = usize::try_from(fields[2]).unwrap_or(usize::MAX);
            let mut message = Vec::new();
            if message.try_reserve_exact(len).is_err() {
                return Err(format!("no memory for the {len} bytes of rank {other}"));
            }
            message.extend_from_slice(&head[FIELDS..FIELDS + len.min(INLINE)]);
            message.resize(len, 0);
            found.push(message);
        }
        let rest_of = |other: &i32| outgoing.to(*other as usize).get(INLINE..);
        let sent = others
            .iter()
            .filter_map(|other| rest_of(other).map(|rest| (*other, rest)));
        let received = others
            .iter()
            .zip(&mut found)
            .filter_map(|(other, message)| message.get_mut(INLINE..).map(|rest| (*other, rest)));
        self.pass(sent, received);
        found.insert(rank as usize, outgoing.to(rank as usize).to_vec());
        Ok(found)
    }

    /// Sends and receives at the same time.
    fn pass<'b>(
        &self,
        sent: impl Iterator<Item = (i32, &'b [u8])>,
        received: impl Iterator<Item = (i32, &'b mut [u8])>,
    ) {
        scope(|scope: &LocalScope<'b>| {
            let mut open: Vec<(i32, Request<'b, [u8], &LocalScope<'b>>)> = Vec::new();
            for (other, message) in received {
                let process = self.world.process_at_rank(other);
                for piece in message.chunks_mut(MOST) {
                    open.push((other, process.immediate_receive_into(scope, piece)));
                }
            }
            for (other, message) in sent {
                let process = self.world.process_at_rank(other);
                for piece in message.chunks(MOST) {
                    open.push((other, process.immediate_send(scope, piece)));
                }
            }
            let mut fruitless = 0;
            while !open.is_empty() {
                let before = open.len();
                let tested = open.into_iter().filter_map(|(other, request)| {
                    request.test().err().map(|request| (other, request))
                });
                open = tested.collect();
                if open.len() < before {
                    fruitless = 0;
                    continue;
                }
                if Instant::now() > self.deadline {
                    self.give_up(open.iter().map(|(other, _)| *other).min().unwrap_or(0));
                }
                fruitless += 1;
                // Ranks may share a core: who waits has to let the others compute.
                match fruitless {
                    0..1000 => std::thread::yield_now(),
                    _ => std::thread::sleep(Duration::from_micros(100)),
                }
            }
        });
    }

    /// Reports the rank that did not come, and waits to be told to end all ranks. The open requests
    /// keep their buffers until then.
    fn give_up(&self, late: i32) -> ! {
        let timeout = self.timeout;
        let reason = format!("rank {late} did not come within {timeout:?}");
        let _ = self.answer.send(Err(reason));
        loop {
            match self.calls.recv() {
                Ok(Call::Abort(code)) => self.world.abort(code),
                Ok(Call::Exchange { answer, .. }) => {
                    let _ = answer.send(Err("an earlier exchange has failed".to_string()));
                }
                Err(_) => self.world.abort(1),
            }
        }
    }
}
