//! The values of tensors on the CPU.

use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, FloatDType, IntDType, Shape, TensorData};

/// The same as f32, element after element.
pub(crate) fn contiguous_f32(x: FloatTensor<Flex>) -> FloatTensor<Flex> {
    let x = in_dtype(x, DType::F32);
    if x.is_contiguous() {
        x
    } else {
        x.to_contiguous()
    }
}

/// Of a tensor that is contiguous and f32.
pub(crate) fn floats(x: &FloatTensor<Flex>) -> &[f32] {
    x.as_slice().expect("contiguous f32")
}

/// The same as i32, element after element.
pub(crate) fn contiguous_i32(x: IntTensor<Flex>) -> IntTensor<Flex> {
    let x = if x.dtype() == DType::I32 {
        x
    } else {
        Flex::int_cast(x, IntDType::I32)
    };
    x.to_contiguous()
}

/// Of a tensor that is contiguous and i32.
pub(crate) fn indices(x: &IntTensor<Flex>) -> &[i32] {
    x.as_slice().expect("contiguous i32")
}

/// A tensor of f32 values, cast to `dtype`.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> FloatTensor<Flex> {
    let data = TensorData::new(values, shape.into());
    in_dtype(FloatTensor::<Flex>::from_data(data), dtype)
}

fn in_dtype(x: FloatTensor<Flex>, dtype: DType) -> FloatTensor<Flex> {
    if x.dtype() == dtype {
        x
    } else {
        Flex::float_cast(x, dtype.into())
    }
}

/// A tensor of `dims` that `fill` makes of the values of `x`, in x's dtype.
///
/// # Panics
/// With the error of `fill`.
pub(crate) fn map_f32<E: std::fmt::Display>(
    x: FloatTensor<Flex>,
    dims: [usize; 2],
    fill: impl FnOnce(&[f32], &mut [f32]) -> Result<(), E>,
) -> FloatTensor<Flex> {
    let dtype = x.dtype();
    let x = contiguous_f32(x);
    let mut y = vec![0.0; dims[0] * dims[1]];
    let filled = fill(floats(&x), &mut y);
    // The lengths are those of tensors with these shapes.
    filled.unwrap_or_else(|error| panic!("{error}"));
    tensor(y, dims, dtype)
}

/// The values of `x` changed in place where nothing else holds them, else those of a copy.
pub(crate) fn in_f32(x: FloatTensor<Flex>, change: impl FnOnce(&mut [f32])) -> FloatTensor<Flex> {
    let dtype = x.dtype();
    if dtype != DType::F32 {
        let x = in_f32(Flex::float_cast(x, FloatDType::F32), change);
        return Flex::float_cast(x, dtype.into());
    }
    // Nothing of `x` may stay behind: a buffer that is held twice is copied before it is changed.
    let mut x = contiguous_f32(x);
    let count = x.shape().num_elements();
    // A contiguous view of something larger would change what lies around it.
    if x.storage::<f32>().len() != count {
        x = tensor(floats(&x).to_vec(), x.shape(), DType::F32);
    }
    change(x.storage_mut::<f32>());
    x
}
